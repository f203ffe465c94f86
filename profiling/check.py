"""Check the kernels: `python -m profiling.check [--device cpu|cuda] [--kernel NAME] [--json FILE]`, exit status 1 if one is wrong.

Every output and gradient of every case is compared with float64, element by element:

    largest error of the kernel  <=  2 x largest error of an eager run in the same precision  +  4 eps x largest exact value

with the eps of the output's dtype, or of the dtype of the work where that is coarser; integers and flags must be equal. The first
element beyond the budget is printed. Further rows report whether

* the configurations of other architectures stay within the budget (`sm_80`, `sm_90`, `sm_100`);
* the function compiles with `fullgraph=True` and stays within the budget (`compiled`), and the operators pass `torch.library.opcheck`;
* on CUDA, a second run gives the same bits (`again`), and so does a captured graph (`graph`).

Memory that a kernel leaves unwritten holds NaN. Without CUDA the kernels run in Triton's interpreter, and at the same time every
committed configuration is compiled ahead of time (`profiling.aot`). Each kernel has its own processes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kernels import backend
from profiling import aot
from profiling.cases import MODULES, OPERATORS, REGISTRY, Case, Inputs, Outputs, to_device, to_double
from profiling.machine import ROOT, describe, title, write_json

ROUNDING = 4  # units of eps x the largest exact value that are allowed on top of twice the eager error


@dataclasses.dataclass
class Row:
    """The verdict on one output of one case."""

    kernel: str
    case: str
    way: str  # "" for the plain run; else "compiled", "again", "graph", "sm_90", "opcheck"
    output: str
    error: float | None = None
    eager_error: float | None = None
    budget: float | None = None
    problem: str | None = None


def judge(case: Case, way: str, found: Outputs, exact: Outputs, eager: Outputs, eager_exact: Outputs) -> list[Row]:
    """One row for each output that `exact` names. `eager_exact` is exact for the codes that the eager run chose."""
    rows = []
    for name, target in exact.items():
        row = Row(case.kernel, case.name, way, name)
        rows.append(row)
        if name not in found:
            row.problem = "missing"
            continue
        value, low = found[name].detach().cpu(), eager[name].detach().cpu()
        if value.shape != target.shape or value.dtype != low.dtype:
            row.problem = f"is {value.dtype} {list(value.shape)}; expected {low.dtype} {list(target.shape)}"
            continue
        if target.numel() == 0:
            row.error = row.eager_error = row.budget = 0.0
            continue
        errors = _errors(value, target)
        row.error, row.eager_error = errors.max().item(), _errors(low, eager_exact[name]).max().item()
        # The error of an eager run that overflows is no budget.
        row.budget = 2 * row.eager_error if row.eager_error < float("inf") else 0.0
        row.budget += ROUNDING * _eps(value.dtype, case.dtype) * _largest(target)
        if not row.error <= row.budget:
            row.problem = _first_mismatch(value, target, errors, row.budget)
    return rows


def _eps(output: torch.dtype, working: torch.dtype) -> float:
    """Coarser of the eps of the output and of the work; 0 for integers."""
    return max(torch.finfo(output).eps, torch.finfo(working).eps) if output.is_floating_point else 0.0


def _largest(target: Tensor) -> float:
    finite = target.double()[target.double().isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _errors(value: Tensor, target: Tensor) -> Tensor:
    """|value - target|: 0 for equal infinities or two NaNs, infinite for any other infinity or NaN."""
    value, target = value.double(), target.double()
    same = (value == target) | (value.isnan() & target.isnan())
    return torch.where(same, 0.0, (value - target).abs().nan_to_num(nan=float("inf"), posinf=float("inf")))


def _first_mismatch(value: Tensor, target: Tensor, errors: Tensor, budget: float) -> str:
    wrong = ~(errors <= budget)
    index = tuple(wrong.nonzero()[0].tolist())
    expected, got = target[index].item(), value[index].item()
    return f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {list(index)}: expected {expected:.9g}, got {got:.9g}"


@contextlib.contextmanager
def _kernels_chosen() -> Iterator[None]:
    """Triton wherever it can run, and NaN in memory that was not written."""
    before, deterministic = backend.selected_kernels(), torch.are_deterministic_algorithms_enabled()
    if torch.cuda.is_available() or backend.INTERPRETED:  # without either, the public functions run their references
        backend.select_kernels("triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        backend.select_kernels(before)


def _failed(kernel: str, case: str, way: str, error: Exception) -> Row:
    """The row of a case that raised; prints the traceback."""
    print(f"\n{kernel}, {case} {way}:\n{traceback.format_exc()}", file=sys.stderr)
    return Row(kernel, case, way, "-", problem=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}")


def check_case(case: Case, device: torch.device, compiled: bool = False) -> list[Row]:
    """All rows of one case; `compiled` adds the run through `torch.compile`."""
    cpu_inputs = case.inputs()
    inputs, double = to_device(cpu_inputs, device), to_double(cpu_inputs)

    try:
        eager = case.eager(inputs)
        eager_exact = case.exact(double, _to_cpu(eager))
    except Exception as error:
        return [_failed(case.kernel, case.name, "eager", error)]

    def judged(run: Callable[[], Outputs]) -> Callable[[str], list[Row]]:
        def work(way: str) -> list[Row]:
            with _kernels_chosen():
                found = run()
            return judge(case, way, found, case.exact(double, _to_cpu(found)), eager, eager_exact)

        return work

    ways = {"": judged(lambda: case.run(inputs))}
    if case.pinned:
        own = backend.architecture(device)
        others = [arch for arch in backend.ARCHITECTURES if arch != own and (device.type == "cpu" or arch < own)]
        ways |= {f"sm_{arch}": judged(lambda arch=arch: _pinned(case, inputs, arch)) for arch in others}
    if compiled:
        ways["compiled"] = judged(lambda: _compiled(case, inputs, device))
    if device.type == "cuda":
        ways["again"] = lambda way: _repeats(case, way, inputs, case.run)
        ways["graph"] = lambda way: _repeats(case, way, inputs, lambda given: _replayed(case, given))
    rows = []
    for way, work in ways.items():
        try:
            rows += work(way)
        except Exception as error:
            rows.append(_failed(case.kernel, case.name, way, error))
    return rows


def _to_cpu(outputs: Outputs) -> Outputs:
    return {name: value.detach().cpu() for name, value in outputs.items()}


def _pinned(case: Case, inputs: Inputs, arch: int) -> Outputs:
    with backend.pin_architecture(arch):
        return case.run(inputs)


def _compiled(case: Case, inputs: Inputs, device: torch.device) -> Outputs:
    """Through `torch.compile`; on a CPU without Inductor, which only adds compile time around an opaque operator."""
    chosen = "inductor" if device.type == "cuda" else "aot_eager"
    torch._dynamo.reset()
    return case.run(inputs, lambda function: torch.compile(function, fullgraph=True, backend=chosen))


def _repeats(case: Case, way: str, inputs: Inputs, second: Callable[[Inputs], Outputs]) -> list[Row]:
    """Rows that compare two runs bit for bit."""
    with _kernels_chosen():
        first = _to_cpu(case.run(inputs))
        again = _to_cpu(second(inputs))
    rows = []
    for name, value in first.items():
        equal = torch.equal(value.nan_to_num(), again[name].nan_to_num()) and torch.equal(value.isnan(), again[name].isnan())
        problem = None if equal else _first_mismatch(again[name], value, _errors(again[name], value), 0.0)
        rows.append(Row(case.kernel, case.name, way, name, problem=problem))
    return rows


def _replayed(case: Case, inputs: Inputs) -> Outputs:
    """Outputs of the third replay of a captured graph. Capture fails if the function synchronises with the device."""
    torch.use_deterministic_algorithms(False)  # a training step's graph does not contain its checks and fills
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.run(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.run(inputs)
    given = {leaf.data_ptr() for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
    for value in outputs.values():
        if value.is_floating_point() and value.data_ptr() not in given:  # a gradient may be the one that was passed in
            value.fill_(float("nan"))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return outputs


def check_operators(kernel: str, device: torch.device) -> list[Row]:
    """`torch.library.opcheck` of each operator: schema, fake tensors, autograd registration, tracing with dynamic shapes."""
    rows = []
    for name, operator, arguments in OPERATORS[kernel](device):
        try:
            with _kernels_chosen():
                torch.library.opcheck(operator, arguments)
            rows.append(Row(kernel, name, "opcheck", "-"))
        except Exception as error:
            rows.append(_failed(kernel, name, "opcheck", error))
    return rows


def check_kernel(kernel: str, device: torch.device, only: Callable[[Case], bool] | None = None) -> list[Row]:
    """Every case of one kernel in this process, one of them through `torch.compile` too, and its operators; or only the cases of `only`."""
    cases = [case for case in REGISTRY[kernel]() if only is None or only(case)]
    if only is not None:
        return list(itertools.chain.from_iterable(check_case(case, device) for case in cases))
    first = next((case for case in cases if case.pinned), cases[0])
    rows = list(itertools.chain.from_iterable(check_case(case, device, compiled=case is first) for case in cases))
    return rows + check_operators(kernel, device)


def failures(rows: Sequence[Row]) -> list[Row]:
    """The rows that failed."""
    return [row for row in rows if row.problem is not None]


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"{'kernel':<12} {'case':<44} {'way':<8} {'output':<13}    error    eager   budget  verdict"]
    for row in rows:
        numbers = " ".join(f"{x:8.1e}" if x is not None else f"{'':8}" for x in (row.error, row.eager_error, row.budget))
        verdict = "ok" if row.problem is None else f"FAILED {row.problem}"
        lines.append(f"{row.kernel:<12} {row.case:<44} {row.way:<8} {row.output:<13} {numbers}  {verdict}")
    return "\n".join(lines)


def _children(kernels: Sequence[str], device: str, folder: Path) -> list[tuple[str, list[str], dict[str, str]]]:
    """(name, command, environment) of each process, the slowest first. Each writes its report to `folder/NAME.json`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "AIME_KERNELS")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    interpreted = environment | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    modules = list(dict.fromkeys(MODULES[kernel] for kernel in kernels))
    python = [sys.executable, "-m"]
    workers = str(max(1, (os.cpu_count() or 1) // 4))
    children = []
    for module in modules:
        command = ["profiling.aot", module, "--workers", workers, "--json", str(folder / f"{module}.json")]
        children.append((module, [*python, *command], environment))
    for kernel in kernels:
        command = ["profiling.check", "--in-process", "--kernel", kernel, "--device", device, "--json", str(folder / f"{kernel}.json")]
        children.append((kernel, [*python, *command], interpreted))
    return children


def _run_child(child: tuple[str, list[str], dict[str, str]], folder: Path) -> tuple[str, float]:
    """Run one of them: (name, seconds). Its output goes to `folder/NAME.log`."""
    (name, command, environment), began = child, time.perf_counter()
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    seconds = time.perf_counter() - began
    print(f"{name}: {'passed' if status == 0 else 'FAILED'}, {seconds:.0f} s", flush=True)
    return name, round(seconds, 1)


def check_all(kernels: Sequence[str], device: str) -> dict[str, Any]:
    """Run every process and collect the reports: `rows`, `aot`, `broken` (processes without a report), `seconds`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = _children(kernels, device, folder)
        with concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
            seconds = dict(pool.map(lambda child: _run_child(child, folder), children))
        report: dict[str, Any] = {"rows": [], "aot": [], "broken": {}, "seconds": seconds}
        for name, _, _ in children:
            path, log = folder / f"{name}.json", (folder / f"{name}.log").read_text(encoding="utf-8")
            if not path.exists():
                report["broken"][name] = log[-4000:]
                continue
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            report["aot" if name in MODULES.values() else "rows"] += rows
            for part in log.split("\n\n"):
                if "Traceback" in part:
                    print(f"\n{part}", file=sys.stderr)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options and check; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", choices=tuple(REGISTRY), nargs="+", default=list(REGISTRY), help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write machine, versions and rows here")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and exit")
    parser.add_argument(
        "--in-process", action="store_true", help="run the cases in this process, for debugging, and compile nothing ahead of time"
    )
    parser.add_argument("--case", metavar="TEXT", help="with --in-process: only the cases whose names contain this")
    options = parser.parse_args(argv)
    if options.list:
        for kernel in options.kernel:
            print("\n".join(f"{kernel}: {case.name}" for case in REGISTRY[kernel]()))
        return 0
    if options.case is not None and not options.in_process:
        parser.error("--case needs --in-process")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device; use --device cpu")

    began = time.perf_counter()
    if options.in_process:
        if options.device == "cpu" and not backend.INTERPRETED:
            parser.error("--in-process --device cpu: set TRITON_INTERPRET=1, without which no kernel runs on a CPU")
        device = torch.device(options.device)
        only = None if options.case is None else lambda case: options.case in case.name
        rows = list(itertools.chain.from_iterable(check_kernel(kernel, device, only) for kernel in options.kernel))
        if not rows:
            parser.error(f"--case {options.case!r}: no case of {', '.join(options.kernel)} has this in its name; --list names them")
        report = {"rows": [dataclasses.asdict(row) for row in rows], "aot": [], "broken": {}}
    else:
        report = check_all(options.kernel, options.device)
        rows = [Row(**row) for row in report["rows"]]

    failed = failures(rows)
    failed_aot = [row for row in report["aot"] if row["problem"]]
    print("\n" + table(rows))
    if report["aot"]:
        print("\n" + aot.table(report["aot"]))
    for name, log in report["broken"].items():
        print(f"\n{name} ended without a report:\n{log}")
    if failed:
        print(f"\nFirst mismatch: {table(failed[:1]).splitlines()[1]}")
    seconds = time.perf_counter() - began
    print(f"\n{len(rows)} comparisons, {len(failed)} failed")
    print(f"{len(report['aot'])} configurations compiled ahead of time, {len(failed_aot)} failed; {len(report['broken'])} processes broke")
    print(f"{seconds:.0f} s, {title(torch.device(options.device))}")
    bad = bool(failed or failed_aot or report["broken"])
    if options.json:
        write_json(options.json, describe(options.device) | {"passed": not bad, "wall_s": round(seconds, 1), **report})
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
