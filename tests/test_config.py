"""Presets have the sizes of the specification, and a config survives YAML."""

from __future__ import annotations

import pytest
import yaml

from aime_fast.config import PRESETS, from_dict, preset, to_dict


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_yaml(name):
    config = preset(name)
    loaded = yaml.safe_load(yaml.safe_dump(_lists(to_dict(config))))
    assert from_dict(loaded) == config


def test_tiers_have_the_sizes_of_the_specification():
    def sizes(tier):
        c = preset(tier)
        sequences = c.data.batch_size * c.optim.accumulate
        return c.data.sequence_length, c.data.image_size, c.model.latent_dim, c.model.hidden_dim, c.model.max_components, sequences

    assert sizes(1) == (10, 64, 18, 256, 8, 16)
    assert sizes(2) == (20, 84, 36, 512, 15, 32)
    assert sizes(3) == (50, 84, 36, 512, 15, 32)


def test_unknown_tier_and_field_are_named():
    with pytest.raises(ValueError, match="--tier 7"):
        preset(7)
    values = to_dict(preset(1))
    values["model"]["latent_dims"] = 3
    with pytest.raises(ValueError, match="model has no field latent_dims"):
        from_dict(values)


def _lists(value):
    """Tuples as lists, which is how YAML stores them."""
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
