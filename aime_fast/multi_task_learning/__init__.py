"""Pillar 5, optimisation: four task losses, and RGB to reconcile their gradients."""

from aime_fast.multi_task_learning.loss_aggregator import LossAggregator
from aime_fast.multi_task_learning.rgb import RGB

__all__ = ["RGB", "LossAggregator"]
