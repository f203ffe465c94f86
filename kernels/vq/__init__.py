"""Vector quantisation; the mathematics and its sources are in `kernels.vq.reference`, the Triton kernels in `kernels.vq.triton`.

The kernels run behind two operations: `aime_fast::vq_assign` and `aime_fast::vq_update`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.vq.reference import (
    DEAD_THRESHOLD,
    EPS,
    candidate_rows,
    check_shapes,
    code_histogram,
    code_statistics,
    codebook_update_reference,
    codebook_usage,
    initialise_codebook,
    loss_dtype,
    move_codebook,
    pool_rows,
    vector_quantize_reference,
)

__all__ = [
    "DEAD_THRESHOLD",
    "EPS",
    "candidate_rows",
    "code_histogram",
    "code_statistics",
    "codebook_update",
    "codebook_update_reference",
    "codebook_usage",
    "initialise_codebook",
    "move_codebook",
    "pool_rows",
    "vector_quantize",
    "vector_quantize_reference",
]


def _has_kernel(x: Tensor, codebook: Tensor) -> bool:
    """Whether the kernels run for these tensors; they take neither float64 nor an empty batch."""
    return (
        use_triton(x)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and codebook.dtype == torch.float32
        and x.numel() > 0
        and codebook.shape[1] > 0
    )


@torch.library.custom_op("aime_fast::vq_assign", mutates_args=())
def _assign_op(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_shapes(x, codebook)
    if _has_kernel(x, codebook):
        from kernels.vq import launch  # here, so that machines without Triton have the reference

        return launch.assign(x, codebook)
    quantized, codes, commitment = vector_quantize_reference(x, codebook)
    return (*(t.clone(memory_format=torch.contiguous_format) for t in (quantized, codes)), commitment)


@_assign_op.register_fake
def _(x, codebook):
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.int64), x.new_empty((), dtype=loss_dtype(x))


def _save_for_assign(ctx, inputs, output) -> None:
    # Not the codes and the codebook: the codebook buffer has changed before the backward pass.
    ctx.save_for_backward(inputs[0], output[0])
    ctx.set_materialize_grads(False)


def _assign_backward(ctx, grad_quantized, grad_codes, grad_commitment):
    """dL/dx = dL/dquantized + dL/dcommitment * 2 (x - code) / numel, in plain PyTorch: the compiler fuses it with its neighbours."""
    x, quantized = ctx.saved_tensors
    grad = grad_quantized
    if grad_commitment is not None:
        wide = loss_dtype(x)
        grad = (x.to(wide) - quantized.detach().to(wide)) * (grad_commitment * (2 / x.numel()))
        if grad_quantized is not None:
            grad = grad + grad_quantized
    return None if grad is None else grad.to(x.dtype), None


_assign_op.register_autograd(_assign_backward, setup_context=_save_for_assign)


def vector_quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace each row by its nearest code. Codes are chosen by scores with the accuracy of the codebook's dtype.

    Args:
        x: encoder outputs [N, Q, d], any float dtype. The kernel takes fp32, bf16 and fp16; float64 runs the reference.
        codebook: codes [Q, V, d], or [1, V, d] when all heads share one; fp32 for the kernel. It receives no gradient.

    Returns:
        quantized: [N, Q, d] in the dtype of x. Its value is the code; its gradient passes to x unchanged (straight-through).
        codes: int64 [N, Q]. Ties go to the lowest index.
        commitment: scalar, mean (x - sg(code))^2, whose gradient goes to x only; fp32, or float64 for such x. NaN for no rows.

    Raises:
        ValueError: the shapes do not fit each other.

    Source: van den Oord et al., arXiv 1711.00937.

    Example:
        >>> quantized, codes, commitment = vector_quantize(torch.randn(100, 4, 64), torch.randn(4, 256, 64))
    """
    check_shapes(x, codebook)
    if _has_kernel(x, codebook):
        return torch.ops.aime_fast.vq_assign(x, codebook)
    return vector_quantize_reference(x, codebook)


@torch.library.custom_op("aime_fast::vq_update", mutates_args=())
def _update_op(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor,
    candidates_u: Tensor,
    decay: float,
    eps: float,
    dead_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_shapes(x, codebook)
    state, settings = (codebook, cluster_size, embedding_sum), (decay, eps, dead_threshold)
    if _has_kernel(x, codebook):
        from kernels.vq import launch

        return launch.update(x, codes, state, candidates_u, *settings)
    return tuple(t.contiguous() for t in codebook_update_reference(x, codes, *state, candidates_u, *settings))


@_update_op.register_fake
def _(x, codes, codebook, cluster_size, embedding_sum, candidates_u, decay, eps, dead_threshold):
    state = (codebook, cluster_size, embedding_sum)
    return *(t.new_empty(t.shape) for t in state), codebook.new_empty(codebook.shape[:2], dtype=torch.int64)


@torch.no_grad()
def codebook_update(
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
    """One moving-average step of the codebook; returns new tensors and changes none.

    The averages are of rows *a batch*: `cluster_size` tends to the mean number of rows assigned to a code in a batch. A code whose
    average is below `dead_threshold` is replaced by a row of this batch and restarts with a `cluster_size` of exactly the threshold.
    The result is deterministic: rows are added in order on a CPU, elsewhere by one-hot products whose partial sums depend on the
    shapes alone.

    Args:
        x: encoder outputs [N, Q, d].
        codes: their codes, int64 [N, Q].
        codebook: [Q|1, V, d].
        cluster_size: moving average of the counts [Q|1, V].
        embedding_sum: moving average of the sums of rows [Q|1, V, d].
        candidates_u: uniform randoms in [0, 1) [Q|1, V]; entry (q, v) picks the row that replaces code v of head q if it is dead.
        decay: weight of the old averages.
        eps: Laplace smoothing of the counts.
        dead_threshold: a code with a smaller average count is replaced; 0 replaces none.

    Returns:
        codebook, cluster_size, embedding_sum: the same shapes and dtypes.
        counts: int64 [Q|1, V], how often each code was chosen in this batch; see `codebook_usage`.

    Raises:
        ValueError: the shapes of x and the codebook do not fit each other.

    Sources: arXiv 1711.00937, appendix A.1; arXiv 1906.00446 (Laplace smoothing).
    """
    check_shapes(x, codebook)
    update = torch.ops.aime_fast.vq_update if _has_kernel(x, codebook) else codebook_update_reference
    return update(x, codes, codebook, cluster_size, embedding_sum, candidates_u, decay, eps, dead_threshold)
