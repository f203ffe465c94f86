"""The vector quantiser: nearest code, straight-through gradient, codebook learnt by exponential moving average.

Source: van den Oord et al., arXiv 1711.00937 (VQ-VAE, appendix A.1 for the moving average); Razavi et al., arXiv 1906.00446.
The arithmetic is in `kernels.vq`; this module has the state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from kernels import vq


class Quantized(NamedTuple):
    """N rows of Q vectors, each replaced by its nearest code, and statistics of the batch."""

    vectors: Tensor  # [N, Q, d], straight-through gradient
    codes: Tensor  # int64 [N, Q]
    commitment: Tensor  # scalar, mean squared distance to the code
    perplexity: Tensor  # scalar, exp of the entropy of code use in this batch, mean over heads
    usage: Tensor  # scalar, share of codes in use in this batch


class VectorQuantizer(nn.Module):
    """Q heads with V codes of width d each, or one codebook that all heads share.

    Quantising never changes the codebook: a training step calls `initialise` before and `learn` after it.

    Args: decay of the moving averages; eps, Laplace smoothing of the counts; dead_threshold, the average count below which a code is
    replaced.
    """

    def __init__(
        self,
        heads: int = ModelConfig.codebook_heads,
        codebook_size: int = ModelConfig.codebook_size,
        code_dim: int = ModelConfig.code_dim,
        share_codebook: bool = ModelConfig.share_codebook,
        decay: float = ModelConfig.codebook_decay,
        eps: float = vq.EPS,
        dead_threshold: float = vq.DEAD_THRESHOLD,
    ):
        super().__init__()
        self.heads, self.codebook_size, self.code_dim = heads, codebook_size, code_dim
        self.decay, self.eps, self.dead_threshold = decay, eps, dead_threshold
        books = 1 if share_codebook else heads
        self.register_buffer("codebook", torch.randn(books, codebook_size, code_dim))
        self.register_buffer("cluster_size", torch.full((books, codebook_size), dead_threshold))
        self.register_buffer("embedding_sum", self.codebook * dead_threshold)
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Quantized:
        """x [N, Q, d] -> `Quantized`."""
        vectors, codes, commitment = vq.vector_quantize(x, self.codebook)
        with torch.no_grad():
            counts = vq.code_histogram(codes, self.codebook_size, shared=self.codebook.shape[0] == 1)
            perplexity, usage = vq.codebook_usage(counts)
        return Quantized(vectors, codes, commitment, perplexity, usage)

    def lookup(self, codes: Tensor) -> Tensor:
        """codes int64 [..., Q] -> code vectors [..., Q, d], without gradient."""
        head = torch.arange(self.heads, device=codes.device) % self.codebook.shape[0]
        return self.codebook[head, codes]

    def surprise(self, codes: Tensor) -> Tensor:
        """-log of how often a code is used, in nats, mean over the heads: int64 [..., Q] -> [...], without gradient."""
        head = torch.arange(self.heads, device=codes.device) % self.codebook.shape[0]
        share = self.cluster_size / self.cluster_size.sum(1, keepdim=True)
        return -share.log()[head, codes].mean(-1)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """At the first call, set every code to a vector of x [N, Q, d]."""
        u = torch.rand(self.codebook.shape[:2], device=x.device, dtype=self.codebook.dtype)
        state = vq.initialise_codebook(x, self.codebook, self.cluster_size, self.embedding_sum, self.initialised, u, self.dead_threshold)
        for buffer, value in zip((self.codebook, self.cluster_size, self.embedding_sum, self.initialised), state):
            buffer.copy_(value)

    @torch.no_grad()
    def learn(self, x: Tensor, codes: Tensor) -> None:
        """Update the codebook by a batch x [N, Q, d] and its codes int64 [N, Q]."""
        u = torch.rand(self.codebook.shape[:2], device=x.device, dtype=self.codebook.dtype)
        *state, _ = vq.codebook_update(
            x, codes, self.codebook, self.cluster_size, self.embedding_sum, u, self.decay, self.eps, self.dead_threshold
        )
        for buffer, value in zip((self.codebook, self.cluster_size, self.embedding_sum), state):
            buffer.copy_(value)
