"""Presets have the sizes of the specification, a config survives YAML, every field has bounds."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import yaml

from aime_fast.bounds import check
from aime_fast.config import PRESETS, Config, from_dict, preset, to_dict
from aime_fast.errors import ConfigError
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder


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


NUMERIC = [
    (section.name, field.name)
    for section in dataclasses.fields(Config)
    if dataclasses.is_dataclass(getattr(preset("debug"), section.name))
    for field in dataclasses.fields(getattr(preset("debug"), section.name))
    if "Literal" not in str(field.type) and str(field.type) not in ("str", "str | None", "bool")
]
EXTREMES = (0, -1, math.nan, math.inf, 1e30)


def changed(section: str, name: str, value) -> Config:
    config = preset("debug")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


def refusal(config: Config) -> str | None:
    try:
        check(config)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(("section", "name"), NUMERIC)
def test_every_number_has_bounds_that_are_checked(section, name):
    """Of five extreme values none but 0 is inside the bounds of any field; what is refused is named with flag and value."""
    for value in EXTREMES:
        default = getattr(getattr(preset("debug"), section), name)
        entries = (value,) * len(default) if isinstance(default, tuple) else value
        config = changed(section, name, entries)
        message = refusal(config)
        if message is None:
            assert value == 0
        else:
            assert f"--{name.replace('_', '-')} {entries}: expected" in message
            with pytest.raises(ConfigError, match="expected"):
                from_dict(_lists(to_dict(config)))


@pytest.mark.parametrize(
    ("section", "name", "value", "says"),
    [
        ("model", "attention_dim", 6, "in [4, 65536], a multiple of 4"),
        ("model", "encoder_channels", (8, 8), "3 to 3 entries"),
        ("model", "codebook_decay", 1.0, "a number in [0, 1)"),
        ("optim", "aggregation", "sum", "one of norm_weighted, mean"),
        ("run", "epochs", "many", "a number in (0, 1e+06]"),
        ("run", "threads", 10**6, "an integer in [1, 1024]"),
        ("data", "image_size", 7, "an integer in [8, 1024]"),
        ("data", "data", 5, "a value of type str"),
        ("run", "resume", 1, "a value of type bool"),
    ],
)
def test_what_is_wrong_is_said(section, name, value, says):
    with pytest.raises(ConfigError, match=re.escape(f"--{name.replace('_', '-')} {value}: expected") + ".*" + re.escape(says)):
        check(changed(section, name, value))


def test_a_model_by_hand_is_checked_too():
    with pytest.raises(ConfigError, match="--latent-dim 0"):
        DPGMMVariationalRecurrentAutoencoder(latent_dim=0)


def _lists(value):
    """Tuples as lists, which is how YAML stores them."""
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
