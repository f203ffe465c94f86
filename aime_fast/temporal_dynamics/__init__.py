"""Pillar 3, dynamics: the recurrence, the only sequential part of training."""

from aime_fast.temporal_dynamics.lstm import LSTMLayer

__all__ = ["LSTMLayer"]
