"""Numerical cores of AIME: vector quantisation, Kumaraswamy stick-breaking, rotation-based gradient balancing, GroupNorm with SiLU.

Each folder holds one operation. Its plain PyTorch reference is the specification: it runs in float64 on a CPU, compiles with
`fullgraph=True`, and does not synchronise with the device. This package imports nothing of `aime_fast`.
"""

from kernels.group_norm import group_norm_silu
from kernels.kumaraswamy import kumaraswamy_beta_kl, kumaraswamy_log_mean, kumaraswamy_mean_sticks, kumaraswamy_sticks
from kernels.rgb import gram_matrix, rgb_rotate, rgb_rotate_, rotation_coefficients
from kernels.rgb.direct import rgb_direct
from kernels.vq import code_histogram, codebook_update, codebook_usage, initialise_codebook, vector_quantize

__all__ = [
    "code_histogram",
    "codebook_update",
    "codebook_usage",
    "gram_matrix",
    "group_norm_silu",
    "initialise_codebook",
    "kumaraswamy_beta_kl",
    "kumaraswamy_log_mean",
    "kumaraswamy_mean_sticks",
    "kumaraswamy_sticks",
    "rgb_direct",
    "rgb_rotate",
    "rgb_rotate_",
    "rotation_coefficients",
    "vector_quantize",
]
