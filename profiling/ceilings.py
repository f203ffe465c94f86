"""Measure what a device reaches: `python -m profiling.ceilings [--device cpu|cuda] [--json FILE]`.

Writes the description of the machine, the rate of a copy within the device's memory in GB/s (bytes read and written, random data, larger
than its caches) and that of a square matrix product in TFLOP/s: fp32, bf16 and, on CUDA, TF32. A rate is of the median time. Needs PyTorch,
on CUDA also Triton.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from profiling.bench_kernels import measure
from profiling.machine import describe, title, write_json

PRODUCTS = (("fp32", torch.float32, False), ("tf32", torch.float32, True), ("bf16", torch.bfloat16, False))  # name, dtype, TF32


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of a copy of random data: 1 GiB on CUDA, 256 MiB on a CPU."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.randint(2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * measure(lambda: target.copy_(source), device)[0])


def matmul_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large matrix product, by precision; a CPU has no TF32. Whether TF32 is allowed is as before afterwards."""
    cuda, before, rates = device.type == "cuda", torch.backends.cuda.matmul.allow_tf32, {}
    size = 8192 if cuda else 512  # a CPU without bf16 needs seconds for a larger one
    try:
        for name, dtype, tf32 in PRODUCTS:
            if tf32 and not cuda:
                continue
            torch.backends.cuda.matmul.allow_tf32 = tf32
            left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            rates[name] = 2 * size**3 / (1e-3 * measure(lambda left=left, right=right: left @ right, device)[0])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.ceilings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write machine, versions and rates here")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    device = torch.device(options.device)
    copy = copy_rate(device) / 1e9
    products = {name: rate / 1e12 for name, rate in matmul_rates(device).items()}
    print(f"{title(device)}: copy {copy:.0f} GB/s, matmul {', '.join(f'{n} {r:.2f} TFLOP/s' for n, r in products.items())}")
    if options.json:
        write_json(options.json, describe(device) | {"copy_gbps": copy, "matmul_tflops": products})
    return 0


if __name__ == "__main__":
    sys.exit(main())
