"""What `profiling.check` runs: for each kernel, inputs of awkward shape and value, and three ways to the answer.

* `run(inputs, through)`: the public function, with its Triton kernel where that can run.
* `eager(inputs)`: an independent run in the same precision, in plain PyTorch.
* `exact(inputs, outputs)`: the answer in float64, from the same inputs.

Inputs are dictionaries of tensors and settings, the same for all three but for device and dtype. A name of `exact` that is missing from a
run is a failure; outputs that `exact` does not name are not judged. `exact` also sees the outputs of the run that is judged: which code
is nearest may turn on the last bit, so codes are judged by their distance, and what follows from the codes by the codes chosen.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import kumaraswamy, rgb, vq
from kernels.rgb.direct import rgb_direct

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]


def _as_it_is(function: Callable) -> Callable:
    return function


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the check."""

    kernel: str
    name: str
    make: Callable[[torch.Generator], Inputs]  # on the CPU
    run: Callable[..., Outputs]  # run(inputs, through): `through` wraps the public function, in torch.compile for instance
    eager: Callable[[Inputs], Outputs]
    exact: Callable[[Inputs, Outputs], Outputs]
    dtype: torch.dtype = torch.float32  # in which the work is done, for outputs that are not floats of their own
    pinned: bool = False  # run with the configurations of every architecture, not only this machine's

    def inputs(self) -> Inputs:
        """The inputs, always the same."""
        return self.make(torch.Generator().manual_seed(zlib.crc32(f"{self.kernel}/{self.name}".encode())))


def to_double(value: Any) -> Any:
    """Float tensors to float64 on the CPU, inside lists and dictionaries too."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: to_double(item) for name, item in value.items()}
    return [to_double(item) for item in value] if isinstance(value, list) else value


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors to a device, inside lists and dictionaries too, with the strides they have."""
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return [to_device(item, device) for item in value] if isinstance(value, list) else value


def _gradients(outputs: Outputs, leaves: Outputs, cotangents: Outputs) -> Outputs:
    """Outputs and, as "d NAME", the gradients of the leaves. A scalar cotangent reaches the backward expanded, with strides of 0."""
    named = [name for name in cotangents if outputs[name].requires_grad]
    sent = [cotangents[name].to(outputs[name].dtype).expand_as(outputs[name]) for name in named]
    found = torch.autograd.grad([outputs[name] for name in named], list(leaves.values()), sent, allow_unused=True)
    grads = {f"d {name}": torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), found)}
    return {name: value.detach() for name, value in outputs.items()} | grads


def _assign(function: Callable, inputs: Inputs) -> Outputs:
    x = inputs["x"].detach().requires_grad_()
    quantized, codes, commitment = function(x, inputs["codebook"], inputs["precision"])
    outputs = _gradients({"quantized": quantized, "commitment": commitment}, {"x": x}, inputs["cotangents"])
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
    """The nearest distance; and for the codes that were chosen, what must follow from them."""
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
    precision: str = "fp32",
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
        return {"x": x, "codebook": codebook, "precision": precision, "cotangents": given, "dtype": dtype, "ties": values == "ties"}

    return Case(
        "vq_assign",
        name,
        make,
        run=lambda inputs, through=_as_it_is: _assign(through(vq.vector_quantize), inputs),
        eager=lambda inputs: _assign(vq.vector_quantize_reference, inputs),
        exact=_assign_exact,
        dtype=torch.bfloat16 if precision == "bf16" else dtype,
        pinned=pinned,
    )


def _vq_assign() -> list[Case]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
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
        _assign_case("bf16 mode, bf16 x", 139, 2, 64, 257, precision="bf16", dtype=bf16, pinned=True),
        _assign_case("bf16 mode, fp32 x", 139, 2, 64, 257, shared=False, precision="bf16", dtype=f32),
        _assign_case("bf16 mode, exact ties", 103, 1, 64, 200, precision="bf16", dtype=bf16, values="ties"),
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
        # Each candidate lies in the middle of its interval: at an edge, u R may round to either row.
        candidates = (torch.randint(group_rows, (groups, size), generator=g) + 0.5) / group_rows
        return {
            "x": torch.randn(rows, heads, width, generator=g).to(dtype),
            "codes": chosen,
            "codebook": torch.randn(groups, size, width, generator=g),
            "cluster_size": old * torch.rand(groups, size, generator=g),
            "embedding_sum": torch.randn(groups, size, width, generator=g),
            "candidates_u": candidates,
            **(settings or {}),
        }

    return Case(
        "vq_update",
        name,
        make,
        run=lambda inputs, through=_as_it_is: _update(through(vq.codebook_update), inputs),
        eager=lambda inputs: _update(vq.codebook_update_reference, inputs),
        exact=lambda inputs, _: _update_exact(inputs),
        pinned=pinned,
    )


def _update_exact(inputs: Inputs) -> Outputs:
    """The definition, code by code."""
    x, codes, codebook = (inputs[name] for name in ("x", "codes", "codebook"))
    decay, eps, dead_threshold = (inputs.get(n, v) for n, v in (("decay", 0.99), ("eps", 1e-5), ("dead_threshold", 2.0)))
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


def _vq_update() -> list[Case]:
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


STICK_OUTPUTS = ("v", "pi", "log_pi", "log_q", "kl")


def _sticks(function: Callable, inputs: Inputs) -> Outputs:
    names = [name for name in ("log_a", "log_b", "alpha", "log_alpha") if inputs[name] is not None]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    sticks = function(leaves["log_a"], leaves["log_b"], inputs["noise"], leaves.get("alpha"), leaves.get("log_alpha"), kl=inputs["method"])
    outputs = {name: value for name, value in zip(STICK_OUTPUTS, sticks) if value is not None}
    return _gradients(outputs, leaves, inputs["cotangents"])


def _sticks_exact(inputs: Inputs, _: Outputs) -> Outputs:
    noise = inputs["noise"]
    if not noise.is_floating_point():
        noise = kumaraswamy.philox_uniform(noise, inputs["log_a"].shape).double()
    limits = torch.finfo(torch.float32)  # a uniform of 0 or 1 means the number next to it, of the precision of the work
    noise = noise.clamp(limits.tiny, 1 - limits.eps)
    return _sticks(kumaraswamy.kumaraswamy_sticks_reference, inputs | {"noise": noise})


def _sticks_case(
    name: str,
    rows: tuple[int, ...],
    pieces: int,
    reach: float = 1.0,
    noise: str = "uniform",
    kl: str | None = "exact",
    alpha: str = "rows",
    cotangents: str = "dense",
    dtype: torch.dtype = torch.float32,
    pinned: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        shape = (*rows, pieces - 1)
        log_a, log_b = (reach * (2 * torch.rand(shape, generator=g) - 1) for _ in range(2))
        u = torch.rand(shape, generator=g)
        if reach == 5:  # corners of the square, where one formula hands over to another
            corner = torch.randint(0, 9, shape, generator=g)
            log_a = torch.where(corner < 4, (corner % 2).float() * 10 - 5, log_a)
            log_b = torch.where(corner < 4, (corner // 2).float() * 10 - 5, log_b)
        if noise == "edges":
            edges = torch.tensor([0, 1, 2**-24, 1 - 2**-24, 1 - 2**-23, torch.finfo(torch.float32).tiny, 1e-3, 1 - 1e-3])
            u = edges[torch.randint(len(edges), shape, generator=g)]
        concentration = (*rows, 1) if alpha != "sticks" else shape
        has_kl = kl is not None
        prior = 0.2 + 5 * torch.rand(concentration, generator=g)
        mean_log = prior.log() - 0.3 * torch.rand(concentration, generator=g)
        given = {name: torch.randn((*rows, pieces) if "pi" in name else shape, generator=g).to(dtype) for name in STICK_OUTPUTS}
        if not has_kl:
            given.pop("kl")
        if cotangents == "stride 0":
            given = {name: torch.tensor(0.7).to(dtype) for name in given}
        elif cotangents != "dense":
            given = {name: given[name] for name in cotangents.split(", ")}
        return {
            "log_a": log_a.to(dtype),
            "log_b": log_b.to(dtype),
            "noise": torch.randint(2**62, (1,), generator=g) if noise == "seed" else u,
            "alpha": prior.to(dtype) if has_kl else None,
            "log_alpha": mean_log.to(dtype) if has_kl and alpha != "log of alpha" else None,
            "method": kl or "exact",
            "cotangents": given,
        }

    return Case(
        "kumaraswamy",
        name,
        make,
        run=lambda inputs, through=_as_it_is: _sticks(through(kumaraswamy.kumaraswamy_sticks), inputs),
        eager=lambda inputs: _sticks(kumaraswamy.kumaraswamy_sticks_reference, inputs),
        exact=_sticks_exact,
        dtype=dtype,
        pinned=pinned,
    )


def _kumaraswamy() -> list[Case]:
    return [
        _sticks_case("one stick", (1,), 2),
        _sticks_case("K=15, 37 rows", (37,), 15, pinned=True),
        _sticks_case("K=16, no padding", (13,), 16),
        _sticks_case("K=17, one over", (11,), 17),
        _sticks_case("K=64", (7,), 64),
        _sticks_case("K=3, batch axes", (5, 2, 3), 3),
        _sticks_case("corners of [-5, 5]", (29,), 8, reach=5),
        _sticks_case("edges of the noise", (23,), 8, reach=1, noise="edges"),
        _sticks_case("corners, edges of the noise", (31,), 8, reach=5, noise="edges"),
        _sticks_case("corners, log pi only", (31,), 8, reach=5, cotangents="log_pi"),
        _sticks_case("corners, KL only", (31,), 8, reach=5, cotangents="kl"),
        _sticks_case("noise from a seed", (19,), 9, noise="seed", pinned=True),
        _sticks_case("no KL", (17,), 8, kl=None),
        _sticks_case("no KL, from a seed", (17,), 8, kl=None, noise="seed"),
        _sticks_case("series10", (11,), 8, kl="series10"),
        _sticks_case("alpha for each stick", (11,), 8, alpha="sticks"),
        _sticks_case("log alpha from alpha", (11,), 8, alpha="log of alpha"),
        _sticks_case("stride-0 gradients", (11,), 8, cotangents="stride 0"),
        _sticks_case("gradient of pi and KL only", (11,), 8, cotangents="pi, kl"),
        _sticks_case("gradient of v only", (11,), 8, cotangents="v"),
        _sticks_case("gradient of log q only", (11,), 8, cotangents="log_q"),
        _sticks_case("bf16", (13,), 8, dtype=torch.bfloat16),
        _sticks_case("fp16", (13,), 8, dtype=torch.float16),
    ]


STATE = ("direction", "angles", "has_direction")


def _rotate(function: Callable, inputs: Inputs) -> Outputs:
    direction, angles, has_direction = (inputs[name].clone() for name in STATE)
    out = torch.full_like(direction, float("nan")) if inputs["out"] else None
    given = {} if out is None else {"out": out}
    result, gram, norm = function(inputs["gradients"], direction, angles, has_direction, **inputs["settings"], **given)
    result = torch.cat([piece.reshape(-1) for piece in result]) if isinstance(result, list) else result
    outputs = {"result": result, "direction": direction, "angles": angles, "has_direction": has_direction, "gram": gram, "norm": norm}
    return outputs if out is None else outputs | {"out": out}


def _rotate_direct(inputs: Inputs, working: torch.dtype) -> Outputs:
    """The algorithm on whole vectors, which shares nothing with the kernels; clipped as `clip_grad_norm_` does."""
    gradients, settings = inputs["gradients"], dict(inputs["settings"])
    if isinstance(gradients, list):
        like = [next(g for g in column if g is not None) for column in zip(*gradients)]
        rows = [[torch.zeros_like(like[i]) if g is None else g for i, g in enumerate(task)] for task in gradients]
        gradients = torch.stack([torch.cat([g.reshape(-1) for g in task]) for task in rows])
    dtype = gradients.dtype
    gradients, direction, angles = gradients.to(working), inputs["direction"].to(working), inputs["angles"].to(working)
    max_norm = settings.pop("max_norm", None)
    rows = torch.cat([gradients, direction.unsqueeze(0)])
    outputs = {"gram": (rows @ rows.t()).double()}
    has_direction = inputs["has_direction"]
    if not bool(gradients.isfinite().all()):  # nothing moves, and what comes out is the caller's to throw away
        return {"direction": direction, "angles": angles, "has_direction": has_direction}
    result, new_direction, new_angles, norm = rgb_direct(gradients, direction, angles, bool(has_direction), **settings)
    if max_norm is not None:
        result = result * (max_norm / (norm + 1e-6)).clamp(max=1)
    outputs |= {"direction": new_direction, "angles": new_angles, "has_direction": torch.ones_like(has_direction), "norm": norm.double()}
    outputs |= {"out": result} if inputs["out"] else {}
    return outputs | {"result": result.to(working if inputs["out"] or working == torch.float64 else dtype)}


def _rotate_case(
    name: str,
    tasks: int,
    size: int,
    state: str = "moving",
    gradients: Callable[[Tensor, Tensor], Any] | None = None,
    dtype: torch.dtype = torch.float32,
    out: bool = False,
    pinned: bool = False,
    **settings: Any,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        common = torch.randn(size, generator=g)
        rows = torch.randn(tasks, size, generator=g) + 0.5 * common
        direction = torch.nn.functional.normalize(torch.randn(size, generator=g) + common, dim=0)
        angles = 0.3 * torch.rand(tasks, generator=g)
        if state == "new":
            direction, angles = torch.zeros(size), torch.zeros(tasks)
        given = rows.to(dtype) if gradients is None else gradients(rows.to(dtype), direction.to(dtype))
        has_direction = torch.tensor(state != "new")
        return {
            "gradients": given, "direction": direction, "angles": angles, "has_direction": has_direction, "settings": settings, "out": out,
        }  # fmt: skip

    return Case(
        "rgb",
        name,
        make,
        run=lambda inputs, through=_as_it_is: _rotate(through(rgb.rgb_rotate_), inputs),
        eager=lambda inputs: _rotate_direct(inputs, torch.float32),
        exact=lambda inputs, _: _rotate_direct(inputs, torch.float64),
        dtype=torch.float32,
        pinned=pinned,
    )


def _some_zero(rows: Tensor, _: Tensor) -> Tensor:
    rows[::2] = 0
    return rows


def _aligned_pair(rows: Tensor, _: Tensor) -> Tensor:
    rows[1] = 3 * rows[0]
    return rows


def _opposed_pair(rows: Tensor, _: Tensor) -> Tensor:
    rows[1] = -2 * rows[0]
    return rows


def _along_direction(rows: Tensor, direction: Tensor) -> Tensor:
    rows[0], rows[1] = 5 * direction, -4 * direction
    return rows


def _scales(rows: Tensor, _: Tensor) -> Tensor:
    return rows * torch.logspace(-6, 3, len(rows)).unsqueeze(1).to(rows.dtype)


def _not_finite(rows: Tensor, _: Tensor) -> Tensor:
    rows[0, -1] = float("nan")
    return rows


def _as_lists(rows: Tensor, _: Tensor) -> list[list[Tensor | None]]:
    """Two matrices and a vector; the second task misses the first of them and the third the last."""
    size = rows.shape[1]
    tasks = [[row[:35].view(5, 7), row[35 : size - 11].view(1, -1), row[size - 11 :]] for row in rows]
    tasks[1][0] = tasks[2][2] = None
    return tasks


def _columns_first(rows: Tensor, _: Tensor) -> Tensor:
    return rows.t().contiguous().t()


def _from_arena(rows: Tensor, _: Tensor) -> Tensor:
    arena = torch.full((rows.shape[0], rows.shape[1] + 13), float("nan"), dtype=rows.dtype)
    arena[:, 5 : 5 + rows.shape[1]] = rows
    return arena[:, 5 : 5 + rows.shape[1]]


def _rgb() -> list[Case]:
    cases = [
        _rotate_case(f"n={n}, P={size}", n, size, pinned=n in (4, 8))
        for n, size in enumerate((127, 1009, 521, 4099, 257, 131, 1031, 509), 2)
    ]
    return [
        _rotate_case("n=1, P=1", 1, 1),
        _rotate_case("n=1, P=97", 1, 97),
        *cases,
        _rotate_case("n=15, P=61", 15, 61, pinned=True),
        _rotate_case("first call", 4, 307, state="new"),
        _rotate_case("long vectors, several blocks a program", 2, 300007),
        _rotate_case("tasks without gradient", 5, 211, gradients=_some_zero),
        _rotate_case("no gradient at all", 3, 101, gradients=lambda rows, _: 0 * rows),
        _rotate_case("one gradient of two", 2, 101, gradients=_some_zero),
        _rotate_case("two aligned", 3, 499, gradients=_aligned_pair),
        _rotate_case("two opposed, no consensus", 2, 499, gradients=_opposed_pair),
        _rotate_case("two opposed, first call", 2, 499, state="new", gradients=_opposed_pair),
        _rotate_case("along and against the direction", 4, 499, gradients=_along_direction),
        _rotate_case("norms from 1e-6 to 1e3", 4, 997, gradients=_scales),
        _rotate_case("not finite: the state stays", 3, 97, gradients=_not_finite),
        _rotate_case("mean of the unit vectors", 4, 401, aggregation="mean"),
        _rotate_case("mean, a task without gradient", 3, 401, gradients=_some_zero, aggregation="mean"),
        _rotate_case("other settings", 4, 401, mu=0.5, lam=0.1, alpha_steps=5, lr_inner=0.7),
        _rotate_case("no steps", 3, 401, alpha_steps=0),
        _rotate_case("clipped", 4, 401, max_norm=0.5),
        _rotate_case("not clipped, written in place", 4, 401, max_norm=1e4, out=True),
        _rotate_case("bf16 gradients", 4, 1013, dtype=torch.bfloat16),
        _rotate_case("bf16 gradients, fp32 result", 3, 1013, dtype=torch.bfloat16, out=True),
        _rotate_case("fp16 gradients", 4, 509, dtype=torch.float16),
        _rotate_case("lists of tensors, some missing", 4, 149, gradients=_as_lists),
        _rotate_case("columns first in memory", 3, 211, gradients=_columns_first),
        _rotate_case("rows of an arena", 3, 211, gradients=_from_arena),
    ]


REGISTRY: dict[str, Callable[[], list[Case]]] = {
    "vq_assign": _vq_assign,
    "vq_update": _vq_update,
    "kumaraswamy": _kumaraswamy,
    "rgb": _rgb,
}
MODULES = {  # whose committed configurations are compiled ahead of time
    "vq_assign": "kernels.vq.launch",
    "vq_update": "kernels.vq.launch",
    "kumaraswamy": "kernels.kumaraswamy.launch",
    "rgb": "kernels.rgb.launch",
}


def operations(kernel: str, device: torch.device) -> list[tuple[str, Any, tuple]]:
    """(name, operator, arguments) of each registered operator, for `torch.library.opcheck`."""
    g = torch.Generator().manual_seed(0)
    ops = torch.ops.aime_fast

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g).to(device)

    if kernel == "vq_assign":
        x, codebook = normal(7, 2, 16).requires_grad_(), normal(1, 5, 16)
        return [("vq_assign", ops.vq_assign, (x, codebook, "fp32")), ("vq_assign bf16", ops.vq_assign, (x, codebook, "bf16"))]
    if kernel == "vq_update":
        codes = torch.randint(5, (7, 2), generator=g).to(device)
        arguments = (normal(7, 2, 16), codes, normal(2, 5, 16), 4 * uniform(2, 5), normal(2, 5, 16), uniform(2, 5), 0.9, 1e-5, 2.0)
        return [("vq_update", ops.vq_update, arguments)]
    if kernel == "kumaraswamy":
        log_a, log_b, alpha, log_alpha = (t.requires_grad_() for t in (normal(3, 4), normal(3, 4), 1 + uniform(3, 1), normal(3, 1)))
        noise = uniform(3, 4)
        return [
            ("kumaraswamy_sticks", ops.kumaraswamy_sticks, (log_a, log_b, noise, alpha, log_alpha, "exact")),
            ("kumaraswamy_sticks without KL", ops.kumaraswamy_sticks, (log_a, log_b, noise, None, None, "exact")),
        ]
    state = (normal(29), uniform(3), torch.tensor(True, device=device))
    return [
        ("rgb_rotate_", ops.rgb_rotate_, (normal(3, 29), *state, torch.zeros(29, device=device), 0.9, 1.0, 3, 0.2, "norm_weighted", 1.0))
    ]
