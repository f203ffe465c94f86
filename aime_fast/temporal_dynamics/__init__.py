"""Pillar 3, dynamics: the recurrence, the only part of AIME that is sequential in training."""

from aime_fast.temporal_dynamics.context_prior import ContextPrior
from aime_fast.temporal_dynamics.lstm import LSTMLayer

__all__ = ["ContextPrior", "LSTMLayer"]
