"""Cases of vector quantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import vq
from profiling.cases.case import Case, Inputs, Outputs, unchanged, with_gradients


def _assign(function: Callable, inputs: Inputs) -> Outputs:
    x = inputs["x"].detach().requires_grad_()
    quantized, codes, commitment = function(x, inputs["codebook"])
    outputs = with_gradients({"quantized": quantized, "commitment": commitment}, {"x": x}, inputs["cotangents"])
    return {"codes": codes, "distance": _distance(inputs, codes)} | outputs


def _distances(x: Tensor, codebook: Tensor) -> Tensor:
    """x [N, Q, d], codebook [Q|1, V, d] -> squared distances [N, Q, V], float64."""
    heads = [(x[:, i].double().unsqueeze(1) - codebook[i % codebook.shape[0]].double()).square().sum(2) for i in range(x.shape[1])]
    return torch.stack(heads, 1)


def _distance(inputs: Inputs, codes: Tensor) -> Tensor:
    """Squared distance [N, Q] of each row to the code chosen for it; infinite for a code that does not exist."""
    x, codebook = inputs["x"].detach(), inputs["codebook"]
    valid = (codes >= 0) & (codes < codebook.shape[1])
    head = torch.arange(x.shape[1], device=x.device) % codebook.shape[0]
    chosen = codebook[head, codes.clamp(0, codebook.shape[1] - 1)]  # [N, Q, d]
    return torch.where(valid, (x.double() - chosen.double()).square().sum(2), float("inf"))


def _assign_exact(inputs: Inputs, outputs: Outputs) -> Outputs:
    """The nearest distance, and what follows from the codes that the run chose."""
    x, codebook, cotangents = (inputs[name] for name in ("x", "codebook", "cotangents"))
    distances = _distances(x, codebook)
    codes = outputs["codes"].clamp(0, codebook.shape[1] - 1)
    head = torch.arange(x.shape[1]) % codebook.shape[0]
    chosen = codebook[head, codes].to(inputs["dtype"]).double()  # [N, Q, d]
    zero = torch.zeros((), dtype=torch.float64)
    exact = {
        "distance": distances.min(2).values,
        "quantized": chosen,
        "commitment": (x - chosen).square().mean(),
        "d x": cotangents.get("quantized", zero) + 2 / x.numel() * (x - chosen) * cotangents.get("commitment", zero),
    }
    if inputs["ties"]:
        exact["codes"] = distances.argmin(2)  # the first of equal distances, which these numbers make exactly equal
    return exact


def _assign_case(
    name: str,
    rows: int,
    heads: int,
    width: int,
    size: int,
    shared: bool = True,
    dtype: torch.dtype = torch.float32,
    cotangents: str = "dense",
    values: str = "normal",
    pinned: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        shape, books = (rows, heads, width), (1 if shared else heads, size, width)
        if values == "ties":  # small integers: every score is exact, and many codes are equal
            x, codebook = torch.randint(-2, 3, shape, generator=g).float(), torch.randint(-1, 2, books, generator=g).float()
        else:
            x, codebook = torch.randn(shape, generator=g), torch.randn(books, generator=g)
        if values == "far":  # a common offset that scores have to cancel
            x, codebook = x + 30, codebook + 30
        elif values == "on codes":
            x = codebook[0, torch.randint(size, (rows, heads), generator=g)] + 1e-3 * x
        elif values == "strided":
            x = torch.randn(width, heads, rows, generator=g).permute(2, 1, 0)
        given = {
            "dense": {"quantized": torch.randn(shape, generator=g), "commitment": torch.randn((), generator=g)},
            "stride 0": {"quantized": torch.tensor(1.0), "commitment": torch.tensor(1.0)},
            "quantized only": {"quantized": torch.randn(shape, generator=g)},
            "commitment only": {"commitment": torch.tensor(3.0)},
        }[cotangents]
        given = {name: value.to(dtype) for name, value in given.items()}
        x = x.to(dtype)
        return {"x": x, "codebook": codebook, "cotangents": given, "dtype": dtype, "ties": values == "ties"}

    return Case(
        "vq_assign",
        name,
        make,
        run=lambda inputs, through=unchanged: _assign(through(vq.vector_quantize), inputs),
        eager=lambda inputs: _assign(vq.vector_quantize_reference, inputs),
        exact=_assign_exact,
        dtype=dtype,
        pinned=pinned,
    )


def assign_cases() -> list[Case]:
    bf16, f16 = torch.bfloat16, torch.float16
    return [
        _assign_case("one row, one code", 1, 1, 16, 1),
        _assign_case("ragged rows and codes, separate books", 131, 3, 64, 257, shared=False, pinned=True),
        _assign_case("1024 codes shared by 4 heads", 37, 4, 64, 1024),
        _assign_case("d=12, prime everything", 61, 2, 12, 101, shared=False),
        _assign_case("d=128", 67, 1, 128, 130),
        _assign_case("d=256", 19, 2, 256, 67),
        _assign_case("exact ties go to the lowest code", 103, 2, 16, 200, shared=False, values="ties"),
        _assign_case("far from the origin", 97, 2, 32, 129, values="far"),
        _assign_case("rows close to codes", 89, 2, 32, 300, values="on codes"),
        _assign_case("transposed x", 53, 3, 16, 64, values="strided"),
        _assign_case("stride-0 gradients", 41, 2, 16, 33, cotangents="stride 0"),
        _assign_case("gradient of quantized only", 41, 2, 16, 33, shared=False, cotangents="quantized only"),
        _assign_case("gradient of commitment only", 41, 2, 16, 33, cotangents="commitment only"),
        _assign_case("bf16 x, fp32 codes", 71, 2, 64, 193, dtype=bf16, pinned=True),
        _assign_case("fp16 x, fp32 codes", 71, 2, 32, 65, dtype=f16),
        _assign_case("bf16 x, exact ties", 103, 1, 64, 200, dtype=bf16, values="ties"),
    ]


UPDATE_OUTPUTS = ("codebook", "cluster_size", "embedding_sum", "counts")


def _update(function: Callable, inputs: Inputs) -> Outputs:
    return dict(zip(UPDATE_OUTPUTS, function(**inputs)))


def _update_case(
    name: str,
    rows: int,
    heads: int,
    width: int,
    size: int,
    shared: bool = True,
    dtype: torch.dtype = torch.float32,
    codes: str = "random",
    old: float = 5.0,
    settings: dict[str, float] | None = None,
    pinned: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        groups, group_rows = (1, rows * heads) if shared else (heads, rows)
        chosen = torch.randint(size, (rows, heads), generator=g) if codes == "random" else torch.full((rows, heads), size - 1)
        # Each candidate is in the middle of its interval: at an edge, u R may round to either row.
        candidates = (torch.randint(group_rows, (groups, size), generator=g) + 0.5) / group_rows
        return {
            "x": torch.randn(rows, heads, width, generator=g).to(dtype),
            "codes": chosen,
            "codebook": torch.randn(groups, size, width, generator=g),
            "cluster_size": old * torch.rand(groups, size, generator=g),
            "embedding_sum": torch.randn(groups, size, width, generator=g),
            "candidates_u": candidates,
            "decay": 0.99,
            **(settings or {}),
        }

    return Case(
        "vq_update",
        name,
        make,
        run=lambda inputs, through=unchanged: _update(through(vq.codebook_update), inputs),
        eager=lambda inputs: _update(vq.codebook_update_reference, inputs),
        exact=lambda inputs, _: _update_exact(inputs),
        pinned=pinned,
    )


def _update_exact(inputs: Inputs) -> Outputs:
    """The definition, code by code."""
    x, codes, codebook = (inputs[name] for name in ("x", "codes", "codebook"))
    decay, eps, dead_threshold = inputs["decay"], inputs.get("eps", vq.EPS), inputs.get("dead_threshold", vq.DEAD_THRESHOLD)
    groups, size, width = codebook.shape
    rows = x.reshape(1, -1, width) if groups == 1 else x.transpose(0, 1)  # [G, R, d]
    codes = codes.reshape(1, -1) if groups == 1 else codes.t()  # [G, R]
    counts = torch.stack([torch.bincount(code, minlength=size) for code in codes])
    batch = torch.zeros_like(codebook)
    for group in range(groups):
        batch[group].index_add_(0, codes[group], rows[group])
    sizes = decay * inputs["cluster_size"] + (1 - decay) * counts
    sums = decay * inputs["embedding_sum"] + (1 - decay) * batch
    total = sizes.sum(1, keepdim=True)
    book = sums / ((sizes + eps) / (total + size * eps) * total).unsqueeze(2)
    for group, code in (sizes < dead_threshold).nonzero().tolist():
        fresh = rows[group, int(inputs["candidates_u"][group, code] * rows.shape[1])]
        book[group, code], sums[group, code], sizes[group, code] = fresh, fresh * dead_threshold, dead_threshold
    return dict(zip(UPDATE_OUTPUTS, (book, sizes, sums, counts)))


def update_cases() -> list[Case]:
    return [
        _update_case("one row, one code", 1, 1, 16, 1, settings={"dead_threshold": 0.0}),
        _update_case("shared book, many dead", 211, 3, 64, 131, pinned=True),
        _update_case("separate books", 509, 2, 32, 67, shared=False, pinned=True),
        _update_case("several splits of the rows", 3001, 1, 16, 40),
        _update_case("d=12", 61, 2, 12, 29, shared=False),
        _update_case("d=128", 83, 1, 128, 70),
        _update_case("bf16 rows", 157, 2, 64, 65, dtype=torch.bfloat16),
        _update_case("fp16 rows", 157, 1, 16, 33, dtype=torch.float16),
        _update_case("every row takes the last code", 307, 2, 16, 50, codes="last"),
        _update_case("all dead", 31, 2, 16, 40, shared=False, old=0.5),
        _update_case("none dead, fast decay", 97, 2, 32, 33, settings={"decay": 0.5, "eps": 1e-3, "dead_threshold": 0.0}),
    ]


def assign_operators(device: torch.device) -> list[tuple[str, Any, tuple]]:
    g = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(7, 2, 16, generator=g).to(device).requires_grad_(), torch.randn(1, 5, 16, generator=g).to(device)
    return [("vq_assign", torch.ops.aime_fast.vq_assign, (x, codebook))]


def update_operators(device: torch.device) -> list[tuple[str, Any, tuple]]:
    g = torch.Generator().manual_seed(0)
    x, codes, codebook = torch.randn(7, 2, 16, generator=g), torch.randint(5, (7, 2), generator=g), torch.randn(2, 5, 16, generator=g)
    state = (4 * torch.rand(2, 5, generator=g), torch.randn(2, 5, 16, generator=g), torch.rand(2, 5, generator=g))
    return [("vq_update", torch.ops.aime_fast.vq_update, (*(t.to(device) for t in (x, codes, codebook, *state)), 0.9, 1e-5, 2.0))]
