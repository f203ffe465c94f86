"""Compile every committed kernel configuration ahead of time: `python -m profiling.aot [MODULE ...] [--arch 80 90 100] [--json FILE]`.

No GPU is needed. Each module has `specialisations(arch)`, a list of `kernels.backend.Specialisation`; each entry is compiled to a cubin for
sm_80 (A100), sm_90 (H100, H200) and sm_100 (B200), and its use of registers, stack, local memory and shared memory is read from the cubin.
A kernel fails if it uses the stack, which means that registers were spilled or an array did not fit them, or if it needs more shared
memory than a block can have. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.backend import ARCHITECTURES, Specialisation
from profiling.machine import describe, write_json

MODULES = ("kernels.vq.launch", "kernels.kumaraswamy.launch", "kernels.rgb.launch", "kernels.group_norm.launch")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory that one block may have


def compile_one(entry: Specialisation, arch: int) -> dict[str, Any]:
    """Compile one configuration; the row holds the resources that it needs and, under `problem`, why it fails."""
    row = {"kernel": entry.name, "arch": arch, **entry.launch._asdict()}
    started = time.perf_counter()
    try:
        compiled = _compile(entry, arch)
        row |= {"shared": compiled.metadata.shared, **_resources(compiled.asm["cubin"])}
        row["problem"] = _problem(row, arch)
    except Exception as error:
        row["problem"] = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        row["traceback"] = traceback.format_exc()
    return row | {"seconds": round(time.perf_counter() - started, 2)}


def _compile(entry: Specialisation, arch: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = entry.kernel.arg_names
    constexprs = dict(entry.constexprs) | dict(entry.launch.blocks)
    missing = [name for name in names if name not in entry.signature and name not in constexprs]
    if missing:
        raise ValueError(f"specialisation {entry.name!r} leaves out {', '.join(missing)}")
    signature = {name: "constexpr" if name in constexprs else entry.signature[name] for name in names}
    # As at a launch, the compiler may assume that tensors are aligned, since those of PyTorch are; loads then become wide.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(
        entry.kernel, signature, constexprs={(names.index(name),): value for name, value in constexprs.items()}, attrs=aligned
    )
    options = {"num_warps": entry.launch.num_warps, "num_stages": entry.launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        report = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return read_resources(report)


def read_resources(report: str) -> dict[str, int]:
    """Parse the output of `cuobjdump -res-usage`; of several functions, the largest number of each resource."""
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage names no function: {report!r}")
    return dict(zip(("registers", "stack", "local"), (max(map(int, column)) for column in zip(*found))))


def _problem(row: dict[str, Any], arch: int) -> str | None:
    if row["stack"] or row["local"]:
        return f"spills: {row['stack']} bytes of stack, {row['local']} of local memory"
    if row["shared"] > SHARED_LIMIT[arch]:
        return f"needs {row['shared']} bytes of shared memory; a block of sm_{arch} has {SHARED_LIMIT[arch]}"
    return None


def _compile_numbered(task: tuple[str, int, int]) -> dict[str, Any]:
    """For a pool of processes: a kernel cannot be pickled, its place in the list can."""
    module, arch, place = task
    return compile_one(importlib.import_module(module).specialisations(arch)[place], arch)


def compile_all(modules: Sequence[str] = MODULES, architectures: Sequence[int] = ARCHITECTURES, workers: int = 1) -> list[dict[str, Any]]:
    """One row for each configuration of each module on each architecture."""
    tasks = []
    for module in modules:
        listed = importlib.import_module(module)
        tasks += [(module, arch, place) for arch in architectures for place in range(len(listed.specialisations(arch)))]
    if workers <= 1:
        return [_compile_numbered(task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(_compile_numbered, tasks))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, one configuration a line."""
    lines = [f"{'kernel':<44} {'arch':>4}  {'tiles':<34} warps stages registers stack local  shared seconds  verdict"]
    for row in rows:
        tiles = " ".join(f"{name}={value}" for name, value in row["blocks"].items())
        numbers = [row.get(name, "-") for name in ("registers", "stack", "local", "shared")]
        lines.append(
            f"{row['kernel']:<44} {row['arch']:>4}  {tiles:<34} {row['num_warps']:>5} {row['num_stages']:>6} {numbers[0]:>9} "
            f"{numbers[1]:>5} {numbers[2]:>5} {numbers[3]:>7} {row['seconds']:>7.1f}  {row['problem'] or 'ok'}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m profiling.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="MODULE", help=f"default: {' '.join(MODULES)}")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--workers", type=int, default=1, help="processes that compile side by side")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and interpreted kernels cannot be compiled; unset it")
    for module in options.modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            parser.error(f"{module}: {error}")
    rows = compile_all(options.modules, options.arch, options.workers)
    print(table(rows))
    for row in rows:
        if "traceback" in row:
            print(f"\n{row['kernel']} on sm_{row['arch']}:\n{row['traceback']}", file=sys.stderr)
    failed = sum(row["problem"] is not None for row in rows)
    print(f"\n{len(rows)} configurations compiled ahead of time, {failed} failed")
    if options.json:
        write_json(options.json, describe("cpu") | {"failed": failed, "rows": rows})
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
