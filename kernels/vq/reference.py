"""Vector quantisation in plain PyTorch: nearest code, straight-through gradient, codebook learnt by exponential moving averages.

For one head, with rows x and codes c, the nearest code in Euclidean distance is

    argmin_v |x - c_v|^2  =  argmax_v  x.c_v - |c_v|^2 / 2,

because |x|^2 is the same for every code. Ties go to the lowest index.

With decay r, n_v rows assigned to code v in this batch and s_v their sum, the moving averages, the smoothed counts and the codes are

    N_v <- r N_v + (1 - r) n_v        S_v <- r S_v + (1 - r) s_v
    M_v = (N_v + eps) / (sum N + V eps) * sum N        c_v = S_v / M_v

and a code with N_v below a threshold is replaced by a row of the batch.

Sources: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning", arXiv 1711.00937 (straight-through
gradient; appendix A.1, moving averages); Razavi, van den Oord and Vinyals, arXiv 1906.00446 (Laplace smoothing of the counts).

Shapes: N rows, Q heads, d code width, V codes; a shared codebook has a leading axis of 1 in place of Q.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-5  # Laplace smoothing of the counts
DEAD_THRESHOLD = 2.0  # a code with a smaller average count is replaced

# The N x V scores are formed in blocks of rows. A block should stay in the cache of a CPU; on a GPU only memory limits it.
BLOCK_SCORES_CPU = 1 << 19
BLOCK_SCORES = 1 << 26
MAX_BLOCKS = 64  # torch.compile unrolls the loop over blocks


def check_shapes(x: Tensor, codebook: Tensor) -> None:
    """Raise ValueError unless x is [N, Q, d] and the codebook [Q|1, V, d]."""
    if x.ndim != 3 or codebook.ndim != 3 or x.shape[2] != codebook.shape[2] or codebook.shape[0] not in (1, x.shape[1]):
        raise ValueError(
            f"vector quantisation: x is {list(x.shape)} and the codebook {list(codebook.shape)}; "
            "expected x [N, Q, d] and a codebook [Q, V, d], or [1, V, d] when the heads share one"
        )


def loss_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the commitment loss: float32, or float64 for such x."""
    return torch.promote_types(x.dtype, torch.float32)


def _block_rows(rows: int, scores_per_row: int, device: torch.device) -> int:
    limit = BLOCK_SCORES_CPU if device.type == "cpu" else BLOCK_SCORES
    return max(1, limit // scores_per_row, -(-rows // MAX_BLOCKS))


def nearest_codes(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code for each row and head; x [N, Q, d], codebook [Q|1, V, d] -> int64 [N, Q]."""
    check_shapes(x, codebook)
    rows, heads, width = x.shape
    shared, size = codebook.shape[0] == 1, codebook.shape[1]
    codebook = codebook.detach()
    x = x.detach().to(codebook.dtype)
    x = x.reshape(1, rows * heads, width) if shared else x.transpose(0, 1)  # [G, R, d], one group for each codebook
    # Scores in half precision would choose other codes, so autocast is disabled.
    with torch.autocast(x.device.type, enabled=False):
        half_norm = codebook.square().sum(2).mul(0.5).unsqueeze(1)  # [G, 1, V]
        block = _block_rows(x.shape[1], codebook.shape[0] * size, x.device)
        codes = [torch.baddbmm(half_norm, part, codebook.mT, beta=-1).argmax(2) for part in x.split(block, 1)]
    codes = torch.cat(codes, 1)  # [G, R]
    return codes.view(rows, heads) if shared else codes.t().contiguous()


def _gather(codebook: Tensor, codes: Tensor) -> Tensor:
    """Codes [N, Q] -> their vectors [N, Q, d]."""
    groups, size, width = codebook.shape
    offset = torch.arange(groups, device=codes.device) * size  # [Q|1]
    return functional.embedding(codes + offset, codebook.reshape(groups * size, width))


def vector_quantize_reference(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.vq.vector_quantize` in plain PyTorch."""
    codes = nearest_codes(x, codebook)
    chosen = _gather(codebook.detach(), codes).to(x.dtype)  # [N, Q, d]
    commitment = functional.mse_loss(x.to(loss_dtype(x)), chosen.to(loss_dtype(x)))
    # x - x.detach() is exactly 0, so the value is the code itself; x + (code - x) would round.
    return chosen + (x - x.detach()), codes, commitment


def code_histogram(codes: Tensor, size: int, shared: bool) -> Tensor:
    """How often each code was chosen: codes int64 [N, Q] -> counts int64 [Q, V], or [1, V] with `shared`."""
    heads = 1 if shared else codes.shape[1]
    offset = torch.arange(heads, device=codes.device) * size
    flat = (codes + offset).reshape(-1)
    # Integer addition is associative, so this is deterministic on a GPU as well.
    counts = torch.zeros(heads * size, dtype=torch.int64, device=codes.device)
    return counts.scatter_add(0, flat, torch.ones_like(flat)).view(heads, size)


def codebook_usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Perplexity exp(entropy) of the code distribution, mean over heads, and the share of codes that were chosen at all.

    Args:
        counts: [Q|1, V], integer or float, for instance from `code_histogram`.

    Returns:
        Two scalars, in the dtype of `counts`; float32 for integers.
    """
    counts = counts if counts.is_floating_point() else counts.float()
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    perplexity = torch.special.entr(share).sum(1).exp().mean()
    return perplexity, (counts > 0).to(counts.dtype).mean()


def pool_rows(x: Tensor, groups: int) -> Tensor:
    """The rows that each codebook is made of: x [N, Q, d] -> [Q, N, d], or [1, N * Q, d] where there is one group."""
    rows, heads, width = x.shape
    return x.reshape(1, rows * heads, width) if groups == 1 else x.transpose(0, 1)


def candidate_rows(x: Tensor, candidates_u: Tensor) -> Tensor:
    """Rows of the batch picked by uniform randoms [Q|1, V] -> [Q|1, V, d]."""
    pool, width = pool_rows(x, candidates_u.shape[0]), x.shape[2]
    index = (candidates_u * pool.shape[1]).long().clamp_max(pool.shape[1] - 1)  # [G, V]
    return pool.gather(1, index.unsqueeze(2).expand(-1, -1, width))


def code_sums(x: Tensor, codes: Tensor, groups: int, size: int) -> Tensor:
    """Sum of the rows assigned to each code: [Q|1, V, d]."""
    width = x.shape[2]
    if x.device.type == "cpu":
        offset = torch.arange(groups, device=codes.device) * size
        flat = (codes + offset).reshape(-1)
        return x.new_zeros(groups * size, width).index_add(0, flat, x.reshape(-1, width)).view(groups, size, width)
    return one_hot_sums(x, codes, groups, size)  # on a GPU index_add uses atomics and is not deterministic


def one_hot_sums(x: Tensor, codes: Tensor, groups: int, size: int) -> Tensor:
    """`code_sums` as a product with one-hot rows, which adds in a fixed order."""
    width = x.shape[2]
    codes = codes.reshape(1, -1) if groups == 1 else codes.t()  # [G, R]
    rows = x.reshape(1, -1, width) if groups == 1 else x.transpose(0, 1)  # [G, R, d]
    label = torch.arange(size, device=x.device).view(1, size, 1)
    block = _block_rows(rows.shape[1], groups * size, x.device)
    total = x.new_zeros(groups, size, width)
    with torch.autocast(x.device.type, enabled=False):
        for part, code in zip(rows.split(block, 1), codes.split(block, 1)):
            total = torch.baddbmm(total, (code.unsqueeze(1) == label).to(x.dtype), part)
    return total


@torch.no_grad()
def codebook_update_reference(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor,
    candidates_u: Tensor,
    decay: float,
    eps: float = EPS,
    dead_threshold: float = DEAD_THRESHOLD,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.vq.codebook_update` in plain PyTorch."""
    fresh = candidate_rows(x.to(codebook.dtype), candidates_u)
    return move_codebook(*code_statistics(x, codes, codebook), fresh, codebook, cluster_size, embedding_sum, decay, eps, dead_threshold)


@torch.no_grad()
def code_statistics(x: Tensor, codes: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """What `move_codebook` needs to know of a batch x [N, Q, d] with codes int64 [N, Q]: (counts int64 [Q|1, V], sums [Q|1, V, d]).

    Those of parts of a batch add up to those of the batch.
    """
    check_shapes(x, codebook)
    groups, size, _ = codebook.shape
    return code_histogram(codes, size, groups == 1), code_sums(x.to(codebook.dtype), codes, groups, size)


@torch.no_grad()
def move_codebook(
    histogram: Tensor, sums: Tensor, fresh: Tensor, codebook: Tensor, cluster_size: Tensor, embedding_sum: Tensor, decay: float, eps: float,
    dead_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The second half of `codebook_update`: from `code_statistics` of a batch and `fresh` [Q|1, V, d], the rows that replace dead codes."""
    size = codebook.shape[1]
    cluster_size = torch.lerp(histogram.to(codebook.dtype), cluster_size, decay)
    embedding_sum = torch.lerp(sums, embedding_sum, decay)

    total = cluster_size.sum(1, keepdim=True)  # [Q|1, 1]
    smoothed = (cluster_size + eps) / (total + size * eps) * total  # positive while the head is in use; the sum stays `total`
    codebook = embedding_sum / smoothed.unsqueeze(2)

    dead = cluster_size < dead_threshold  # [Q|1, V]
    return (
        torch.where(dead.unsqueeze(2), fresh, codebook),
        torch.where(dead, dead_threshold, cluster_size),
        torch.where(dead.unsqueeze(2), fresh * dead_threshold, embedding_sum),
        histogram,
    )


@torch.no_grad()
def initialise_codebook(
    fresh: Tensor, codebook: Tensor, cluster_size: Tensor, embedding_sum: Tensor, initialised: Tensor, initial_size: float = DEAD_THRESHOLD
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill the codebook with random rows of the first batch; later calls return their inputs.

    The choice is a `where` on a flag that lives on the device, so every training step can make this call. Random rows suffice as a
    start, because the moving averages amount to k-means spread over time. `initial_size` is small, so the first batches move the codes
    fast. A row that was drawn twice loses every tie to the lower index, falls below the dead threshold and is replaced.

    Args:
        fresh: random rows of the batch [Q|1, V, d], as `candidate_rows` gives them.
        codebook, cluster_size, embedding_sum: as in `kernels.vq.codebook_update`.
        initialised: bool scalar on the device.
        initial_size: average count given to every code; use the dead threshold.

    Returns:
        codebook, cluster_size, embedding_sum, initialised: the same shapes and dtypes.
    """
    return (
        torch.where(initialised, codebook, fresh),
        torch.where(initialised, cluster_size, initial_size),
        torch.where(initialised, embedding_sum, fresh * initial_size),
        torch.ones_like(initialised),
    )
