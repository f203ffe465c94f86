"""Recorded experience: collected from dm_control, stored in HDF5, served as batches on the device."""

from aime_fast.data.augment import augment, normalise
from aime_fast.data.batches import SequenceBatches, make_batches
from aime_fast.data.collectors import collect
from aime_fast.data.dataset import DMCVBDataset
from aime_fast.data.synthetic import SyntheticEpisodes
from aime_fast.data.writer import EpisodeWriter

__all__ = ["DMCVBDataset", "EpisodeWriter", "SequenceBatches", "SyntheticEpisodes", "augment", "collect", "make_batches", "normalise"]
