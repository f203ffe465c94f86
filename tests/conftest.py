"""Shared fixtures."""

from __future__ import annotations

import os

import pytest
import torch

# Workers of pytest-xdist share the cores among themselves, and so do the commands that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from models import make_model

from aime_fast.data import environments
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder
from kernels.backend import select_kernels, selected_kernels

probe, found = environments.probe_renderer, {}


def probe_once(timeout: float = 60.0) -> str:
    """A process renders its test frame, with which every recording begins, once for all tests, and not for each: it takes a second."""
    wanted = os.environ.get("MUJOCO_GL"), timeout
    if wanted not in found:
        found[wanted] = probe(timeout)
    return environments.select_renderer(found[wanted])


environments.probe_renderer = probe_once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first, so that no process is left alone with them at the end; those marked `cuda` need a GPU."""
    items.sort(key=lambda item: "test_compile" not in item.nodeid)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def model() -> DPGMMVariationalRecurrentAutoencoder:
    return make_model()


@pytest.fixture
def triton_kernels():
    """Every operation runs its Triton kernel (interpreted on a CPU), and memory that a kernel leaves unwritten reads as NaN."""
    before, deterministic = selected_kernels(), torch.are_deterministic_algorithms_enabled()
    select_kernels("triton")
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, the largest integer or True
    yield
    torch.use_deterministic_algorithms(deterministic)
    select_kernels(before)
