"""The workloads of `profiling.bench kernels`: each kernel at realistic sizes, eager PyTorch, torch.compile and public peers.

Bytes and operations are counted from the algorithm's inputs and outputs, each read or written once in each pass that is needed.
Peers are optional: pip install vector-quantize-pytorch torchjd.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import backend, group_norm, kumaraswamy, rgb, vq
from kernels.rgb.direct import rgb_direct
from profiling.cases.rgb import DEFAULTS

Call = Callable[[], Any]
SEED = 2026


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel is to reach on an H200; None where there is no target."""

    most_us: float | None = None
    over_eager: float | None = None
    over_compile: float | None = None
    share: float | None = None  # of the ceiling
    launches: int | None = None


@dataclasses.dataclass(frozen=True)
class Workload:
    """One operation at one size. A provider is built when it is measured, and freed before the next one."""

    name: str
    gates: tuple[str, ...]  # kernels whose check must pass
    size: str
    dtype: str
    bytes: int
    operations: int
    ceiling: str  # "copy" or "matmul": what bounds it on the machine
    providers: dict[str, Callable[[], Call]]
    target: Target = Target()

    @property
    def title(self) -> str:
        return f"{self.name}, {self.size}, {self.dtype}"


class Unavailable(Exception):
    """The peer is not installed."""


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED)


def _compile(function: Callable, fullgraph: bool = True) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=fullgraph, dynamic=False)


def _against_reference(make: Callable[[Callable], Call], kernel: Callable, reference: Callable) -> dict[str, Callable[[], Call]]:
    """The three providers of every kernel with a reference."""
    return {"kernel": lambda: make(kernel), "eager": lambda: make(reference), "compile": lambda: make(_compile(reference))}


def _vq_workloads(device: torch.device, rows: int, dtype: torch.dtype, targets: bool) -> Iterator[Workload]:
    """Assignment, codebook update, and both together as in a training step. 4 heads of width 64 share 1024 codes."""
    heads, width, codes = 4, 64, 1024
    name, item = str(dtype).removeprefix("torch."), dtype.itemsize
    vectors = rows * heads

    @functools.lru_cache(maxsize=1)
    def data() -> dict[str, Tensor]:
        g = _generator(device)
        codebook = torch.randn(1, codes, width, generator=g, device=device)
        return {
            "x": torch.randn(rows, heads, width, generator=g, device=device).to(dtype),
            "codebook": codebook,
            "codes": torch.randint(codes, (rows, heads), generator=g, device=device),
            "cluster_size": 3 + torch.rand(1, codes, generator=g, device=device),
            "embedding_sum": 3 * codebook,
            "candidates_u": torch.rand(1, codes, generator=g, device=device),
        }

    state = ("codebook", "cluster_size", "embedding_sum", "candidates_u")

    def on(*names: str) -> Callable[[Callable], Call]:
        def make(function: Callable) -> Call:
            inputs = [data()[name] for name in names]
            return lambda: function(*inputs)

        return make

    def both(quantize: Callable, learn: Callable) -> Callable:
        def step(x: Tensor, codebook: Tensor, *averages: Tensor) -> tuple:
            quantized, codes, commitment = quantize(x, codebook)
            return quantized, commitment, learn(x, codes, codebook, *averages)

        return step

    def peer(training: bool) -> Call:
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as error:
            raise Unavailable(str(error)) from error
        module = VectorQuantize(
            dim=heads * width, codebook_dim=width, codebook_size=codes, heads=heads, separate_codebook_per_head=False, decay=0.99,
            threshold_ema_dead_code=2 if training else 0, commitment_weight=1.0, rotation_trick=False,
        )  # fmt: skip
        module = module.to(device).train(training)
        x = data()["x"].float().reshape(1, rows, heads * width)  # it works in float32
        return lambda: module(x)

    assign = (vq.vector_quantize, vq.vector_quantize_reference)
    update = tuple(functools.partial(function, decay=0.99) for function in (vq.codebook_update, vq.codebook_update_reference))
    averages = codes * (width + 1) * 4  # bytes of one pass over the moving averages
    row_bytes, labels = vectors * width * item, vectors * 8  # bytes of x, or of the vectors of its codes; of the codes
    size = f"{vectors:,} head-vectors of {width}, {codes} codes"
    assign_bytes = 2 * row_bytes + labels + codes * width * 4
    update_bytes = row_bytes + labels + 5 * averages
    products = 2 * vectors * codes * width
    yield Workload(
        "VQ assign", ("vq_assign",), size, name, assign_bytes, products, "matmul",
        _against_reference(on("x", "codebook"), *assign) | {"vector-quantize-pytorch": lambda: peer(training=False)},
        Target(most_us=250 if dtype == torch.bfloat16 else 400) if targets else Target(),
    )  # fmt: skip
    yield Workload(
        "VQ update", ("vq_update",), size, name, update_bytes, vectors * width, "copy",
        _against_reference(on("x", "codes", *state), *update),
        Target(most_us=150) if targets else Target(),
    )  # fmt: skip
    yield Workload(
        "VQ assign + update", ("vq_assign", "vq_update"), size, name, assign_bytes + update_bytes, products, "matmul",
        _against_reference(on("x", *state), *map(both, assign, update)) | {"vector-quantize-pytorch": lambda: peer(training=True)},
    )  # fmt: skip


def _sticks_workloads(device: torch.device, rows: int, sticks: int, with_kl: bool, target: Target) -> Iterator[Workload]:
    """Forward and, with a KL, backward."""

    @functools.lru_cache(maxsize=1)
    def data() -> dict[str, Tensor]:
        g = _generator(device)
        found = {
            name: (2 * torch.rand(rows, sticks, generator=g, device=device) - 1).requires_grad_(with_kl) for name in ("log_a", "log_b")
        }
        if with_kl:
            found["alpha"] = (1 + torch.rand(rows, 1, generator=g, device=device)).requires_grad_()
            found["log_alpha"] = torch.randn(rows, 1, generator=g, device=device).requires_grad_()
        found["u"] = torch.rand(rows, sticks, generator=g, device=device)
        return found

    def forward(function: Callable) -> Call:
        d = data()
        inputs = [d[name].detach() for name in ("log_a", "log_b", "u", "alpha", "log_alpha") if name in d]
        return lambda: function(*inputs)

    def backward(function: Callable) -> Call:
        d = data()
        leaves = [d[name] for name in ("log_a", "log_b", "alpha", "log_alpha")]
        outputs = function(leaves[0], leaves[1], d["u"], *leaves[2:])
        used = [outputs.log_pi, outputs.pi, outputs.kl]
        cotangents = [torch.ones_like(x) for x in used]
        return lambda: torch.autograd.grad(used, leaves, cotangents, retain_graph=True)

    def peer() -> Call:
        d = data()

        def sample() -> tuple[Tensor, ...]:
            distribution = torch.distributions.Kumaraswamy(d["log_a"].detach().exp(), d["log_b"].detach().exp(), validate_args=False)
            v = distribution.rsample()
            rest = torch.nn.functional.pad((1 - v).cumprod(-1), (1, 0), value=1.0)
            pi = torch.nn.functional.pad(v, (0, 1), value=1.0) * rest
            return v, pi, pi.log()

        return sample

    functions = (kumaraswamy.kumaraswamy_sticks, kumaraswamy.kumaraswamy_sticks_reference)
    count, pieces = rows * sticks, rows * (sticks + 1)
    per_row = 8 * rows if with_kl else 0
    forward_bytes = count * (12 + 4 + (4 if with_kl else 0)) + pieces * 8 + per_row
    size, name = f"{rows:,} x {sticks}", "sticks + KL" if with_kl else "sticks"
    yield Workload(
        f"{name} forward", ("kumaraswamy",), size, "float32", forward_bytes, 0, "copy",
        _against_reference(forward, *functions) | {"torch.distributions (no KL)" if with_kl else "torch.distributions": peer},
        target,
    )  # fmt: skip
    if with_kl:
        yield Workload(
            f"{name} backward", ("kumaraswamy",), size, "float32", count * (12 + 4 + 8) + pieces * 8 + 2 * per_row, 0, "copy",
            _against_reference(backward, *functions), target,
        )  # fmt: skip


def _norm_workloads(device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, target: Target) -> Iterator[Workload]:
    """Forward and backward of GroupNorm + SiLU in 8 groups, channels last."""

    @functools.lru_cache(maxsize=1)
    def data() -> list[Tensor]:
        g = _generator(device)
        x, grad = (torch.randn(shape, generator=g, device=device).to(dtype, memory_format=torch.channels_last) for _ in range(2))
        weight, bias = (torch.randn(shape[1], generator=g, device=device) for _ in range(2))
        return [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grad]

    def forward(function: Callable) -> Call:
        inputs = [t.detach() for t in data()[:3]]
        return lambda: function(*inputs, 8)

    def backward(function: Callable) -> Call:
        *leaves, grad = data()
        y = function(*leaves, 8)
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    functions = (group_norm.group_norm_silu, group_norm.group_norm_silu_reference)
    size, name = " x ".join(map(str, shape)), str(dtype).removeprefix("torch.")
    numbers = math.prod(shape) * dtype.itemsize  # bytes of x
    for direction, make, passes in (("forward", forward, 2), ("backward", backward, 3)):
        providers = _against_reference(make, *functions)
        yield Workload(f"GroupNorm + SiLU {direction}", ("group_norm",), size, name, passes * numbers, 0, "copy", providers, target)


def _rgb_workloads(device: torch.device, tasks: int, size: int, dtype: torch.dtype, target: Target) -> Iterator[Workload]:
    """One step of RGB with state in place. "eager" is the algorithm on whole vectors, as published."""

    @functools.lru_cache(maxsize=1)
    def data() -> dict[str, Tensor]:
        g = _generator(device)
        rows = torch.randn(tasks, size, generator=g, device=device)
        rows += 0.5 * torch.randn(size, generator=g, device=device)
        direction = torch.nn.functional.normalize(torch.randn(size, generator=g, device=device), dim=0)
        angles, has_direction = torch.zeros(tasks, device=device), torch.ones((), dtype=torch.bool, device=device)
        return {"gradients": rows.to(dtype), "direction": direction, "angles": angles, "has_direction": has_direction}

    def step(choice: str) -> Call:
        d, out = data(), torch.empty(size, device=device)

        def run():
            before = backend.selected_kernels()
            backend.select_kernels(choice)
            try:
                return rgb.rgb_rotate_(d["gradients"], d["direction"], d["angles"], d["has_direction"], **DEFAULTS, out=out)
            finally:
                backend.select_kernels(before)

        return run

    def direct(function: Callable) -> Call:
        d = data()
        return lambda: function(d["gradients"].float(), d["direction"], d["angles"], True, **DEFAULTS)

    def torchjd(name: str) -> Call:
        try:
            from torchjd import aggregation

            aggregator = getattr(aggregation, name)()
        except (ImportError, AttributeError) as error:
            raise Unavailable(str(error)) from error
        matrix = data()["gradients"].float()
        return lambda: aggregator(matrix)

    item = dtype.itemsize
    yield Workload(
        "RGB", ("rgb",), f"{tasks} tasks, {size:,} parameters", str(dtype).removeprefix("torch."),
        size * (2 * (item * tasks + 4) + 8), 2 * size * ((tasks + 1) * (tasks + 2) // 2 + 2 * (tasks + 1)), "copy",
        {
            "kernel": lambda: step("auto"),
            "eager": lambda: direct(rgb_direct),
            **({"compile": lambda: direct(_compile(rgb_direct, fullgraph=False))} if tasks == 4 else {}),  # it branches on norms
            "eager, Gram space": lambda: step("reference"),
            "torchjd PCGrad": lambda: torchjd("PCGrad"),
            "torchjd UPGrad": lambda: torchjd("UPGrad"),
        },
        target,
    )  # fmt: skip


def workloads(kernels: list[str], device: torch.device, quick: bool) -> list[Workload]:
    """All sizes for a device, those with a target first; `quick` keeps the smallest of each."""
    cuda, f32, bf16 = device.type == "cuda", torch.float32, torch.bfloat16
    made: list[Workload] = []
    if {"vq_assign", "vq_update"} & set(kernels):
        sizes = [(640, bf16), (8192, bf16), (65536, bf16), (65536, f32)] if cuda else [(512, f32), (4096, f32)]
        for rows, dtype in sizes[:1] if quick else sizes:
            made += (work for work in _vq_workloads(device, rows, dtype, rows == 65536) if set(work.gates) <= set(kernels))
    if "kumaraswamy" in kernels:
        made += _sticks_workloads(device, 1600, 15, True, Target(most_us=12, over_eager=20, launches=1))
        if not quick:
            made += _sticks_workloads(device, 65536 if cuda else 8192, 15, True, Target())
            made += _sticks_workloads(device, 2**24 // 15 if cuda else 2**16, 15, False, Target(share=0.8) if cuda else Target())
    if "rgb" in kernels:
        sizes = [(4, 2_000_000, f32), (4, 25_000_000, f32), (4, 25_000_000, bf16), (9, 5_000_000, f32)]
        sizes = sizes if cuda else [(4, 200_000, f32), (4, 4_000_000, f32)]
        for tasks, size, dtype in sizes[:1] if quick else sizes:
            target = Target(share=0.8, over_eager=20) if (size, dtype) == (25_000_000, f32) else Target()
            made += _rgb_workloads(device, tasks, size, dtype, target)
    if "group_norm" in kernels:
        large = (640, 128, 21, 21)
        shapes = [((160, 32, 8, 8), bf16), ((160, 48, 16, 16), bf16), (large, bf16), ((640, 256, 11, 11), bf16), ((640, 128, 42, 42), bf16)]
        shapes = shapes if cuda else [((160, 32, 8, 8), f32), ((40, 48, 16, 16), f32)]
        for shape, dtype in shapes[:1] if quick else shapes:
            made += _norm_workloads(device, shape, dtype, Target(share=0.6) if shape == large else Target())
    return sorted(made, key=lambda work: work.target == Target())
