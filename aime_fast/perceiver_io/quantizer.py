"""The vector quantiser: nearest code, straight-through gradient, codebook learnt by exponential moving average.

Source: van den Oord et al., arXiv 1711.00937 (VQ-VAE, appendix A.1 for the moving average); Razavi et al., arXiv 1906.00446.
The arithmetic is in `kernels.vq`; this module has the state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.runtime import ranks
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

    def forward(self, x: Tensor, counts_all: bool = False) -> Quantized:
        """x [N, Q, d] -> `Quantized`; `counts_all`: perplexity and usage are of the rows of all ranks."""
        vectors, codes, commitment = vq.vector_quantize(x, self.codebook)
        with torch.no_grad():
            counts = vq.code_histogram(codes, self.codebook_size, shared=self.codebook.shape[0] == 1)
            counts = ranks.total(counts) if counts_all else counts
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
    def initialise(self, x: Tensor, sequences: int) -> None:
        """At the first call, set every code to a vector of x [N, Q, d], the rows of so many sequences."""
        fresh = self._candidates(x, sequences)
        state = vq.initialise_codebook(fresh, self.codebook, self.cluster_size, self.embedding_sum, self.initialised, self.dead_threshold)
        for buffer, value in zip((self.codebook, self.cluster_size, self.embedding_sum, self.initialised), state):
            buffer.copy_(value)

    @torch.no_grad()
    def learn(self, x: Tensor, codes: Tensor, sequences: int) -> None:
        """Update the codebook by a batch x [N, Q, d], the rows of so many sequences, and its codes int64 [N, Q]."""
        averages, settings = (self.codebook, self.cluster_size, self.embedding_sum), (self.decay, self.eps, self.dead_threshold)
        if ranks.size() == 1:
            *state, _ = vq.codebook_update(x, codes, *averages, self._uniform(x), *settings)
        else:  # in three parts: what ranks have counted and added is to be known before the averages move
            fresh = self._candidates(x, sequences)
            counts, sums = (ranks.total(part) for part in vq.code_statistics(x, codes, self.codebook))
            *state, _ = vq.move_codebook(counts, sums, fresh, *averages, *settings)
        for buffer, value in zip((self.codebook, self.cluster_size, self.embedding_sum), state):
            buffer.copy_(value)

    def _uniform(self, x: Tensor) -> Tensor:
        return torch.rand(self.codebook.shape[:2], device=x.device, dtype=self.codebook.dtype)

    def _candidates(self, x: Tensor, sequences: int) -> Tensor:
        """A random row of the batch for each code, [Q|1, V, d]: of x [N, Q, d], or, where ranks share it, of the rank that has the row."""
        x, u, size = x.to(self.codebook.dtype), self._uniform(x), ranks.size()
        if size == 1:
            return vq.candidate_rows(x, u)
        pool = vq.pool_rows(x, self.codebook.shape[0])  # [Q|1, R, d]
        place = (u * (pool.shape[1] * size)).long().clamp_max(pool.shape[1] * size - 1)
        of_sequence = pool.shape[1] // sequences
        sequence, row = place // of_sequence, place % of_sequence
        mine = sequence % size == ranks.rank()
        index = torch.where(mine, sequence // size * of_sequence + row, 0)
        found = pool.gather(1, index.unsqueeze(2).expand(-1, -1, pool.shape[2]))
        return ranks.total(torch.where(mine.unsqueeze(2), found, 0.0))
