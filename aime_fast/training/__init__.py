"""Training: the update, the loop around it, checkpoints, schedules and logging."""

from aime_fast.training.checkpoint import latest_checkpoint, load_model
from aime_fast.training.faults import check_tensor
from aime_fast.training.online import OnlineTrainer
from aime_fast.training.step import TrainingStep
from aime_fast.training.trainer import DMCVBTrainer

__all__ = ["DMCVBTrainer", "OnlineTrainer", "TrainingStep", "check_tensor", "latest_checkpoint", "load_model"]
