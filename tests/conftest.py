"""Shared fixtures."""

from __future__ import annotations

import pytest
from models import make_model

from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder


@pytest.fixture(scope="session")
def model() -> DPGMMVariationalRecurrentAutoencoder:
    return make_model()
