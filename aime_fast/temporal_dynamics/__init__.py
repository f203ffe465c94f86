"""Pillar 3, dynamics: the recurrence, the only sequential part of training, and the prior of the context."""

from aime_fast.temporal_dynamics.context_prior import ContextPrior
from aime_fast.temporal_dynamics.lstm import LSTMLayer

__all__ = ["ContextPrior", "LSTMLayer"]
