"""Pillar 2, representation: the Dirichlet-process Gaussian-mixture prior."""

from aime_fast.generative_prior.dpgmm_prior import DPGMMPrior
from aime_fast.generative_prior.gamma_posterior import GammaPosterior
from aime_fast.generative_prior.stick_breaking import AdaptiveStickBreaking, get_effective_components

__all__ = ["AdaptiveStickBreaking", "DPGMMPrior", "GammaPosterior", "get_effective_components"]
