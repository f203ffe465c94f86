"""The harness: a broken kernel does not pass, its bench prints no speed-up, a kernel that spills is found, bad options are named."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import backend, rgb
from profiling import aot, bench, bench_kernels, bench_train, cases, ceilings, check, suite
from profiling.workloads import Target, Unavailable, Workload

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def few_cases(monkeypatch):
    """RGB with two small cases."""
    chosen = [case for case in cases.REGISTRY["rgb"]() if case.name in ("n=3, P=1009", "clipped")]
    monkeypatch.setitem(cases.REGISTRY, "rgb", lambda: chosen)


@pytest.fixture
def broken(monkeypatch, few_cases):
    """The result of RGB has the wrong sign."""
    right = rgb.rgb_rotate_

    def wrong(*args, **settings):
        result, gram, norm = right(*args, **settings)
        return -result, gram, norm

    monkeypatch.setattr(rgb, "rgb_rotate_", wrong)


def checked(*arguments: str) -> int:
    return check.main(["--in-process", "--device", DEVICE, *arguments])


def test_right_kernel_passes(few_cases, capsys, tmp_path):
    assert checked("--kernel", "rgb", "--case", "", "--json", str(tmp_path / "check.json")) == 0
    assert "0 failed" in capsys.readouterr().out
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["passed"]
    assert {"machine", "versions", "git_commit", "rows"} <= written.keys()
    assert all(row["error"] <= row["budget"] for row in written["rows"] if row["error"] is not None)


def test_broken_kernel_fails_and_says_where(broken, capsys):
    assert checked("--kernel", "rgb", "--case", "P=1009") == 1
    last = capsys.readouterr().out.split("First mismatch:")[1]
    assert "1009 of 1009 wrong, first at [0]: expected " in last
    assert ", got " in last


SIGNS = {  # kernel -> (file, what it says, the same with one sign turned)
    "vq_assign": ("vq/triton.py", "score -= tl.load(norms", "score += tl.load(norms"),
    "vq_update": ("vq/triton.py", "+ (1.0 - DECAY) * batch", "- (1.0 - DECAY) * batch"),
    "kumaraswamy": ("kumaraswamy/triton.py", "by_lb -= at * inverse_a", "by_lb += at * inverse_a"),
    "rgb": ("rgb/triton.py", "total += tl.load(c + i)", "total -= tl.load(c + i)"),
    "group_norm": ("group_norm/triton.py", "(s + u * s * (1.0 - s))", "(s - u * s * (1.0 - s))"),
}


def test_one_sign_in_each_kernel_is_found(tmp_path):
    for package in ("kernels", "profiling"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in SIGNS.values():
        file = tmp_path / "kernels" / name
        source = file.read_text()
        assert source.count(old) == 1, f"{name} no longer says {old!r} once; choose another sign to break"
        file.write_text(source.replace(old, new))
    report = tmp_path / "check.json"
    command = [sys.executable, "-m", "profiling.check", "--in-process", "--device", DEVICE, "--case", "bf16", "--json", str(report)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "First mismatch:" in done.stdout
    failed = {row["kernel"] for row in json.loads(report.read_text())["rows"] if row["problem"]}
    assert failed == set(SIGNS)


def test_kernel_that_raises_fails_the_check(monkeypatch, few_cases, capsys):
    def wrong(*args, **settings):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(rgb, "rgb_rotate_", wrong)
    assert checked("--kernel", "rgb", "--case", "clipped") == 1
    assert "FAILED RuntimeError: no kernel image" in capsys.readouterr().out


def verdict(value: torch.Tensor, target: torch.Tensor, eager: torch.Tensor) -> check.Row:
    case = cases.Case("k", "c", lambda g: {}, dict, dict, dict)
    exact = {"y": target}
    return check.judge(case, "", {"y": value}, exact, {"y": eager}, exact)[0]


def test_budget_is_twice_the_eager_error_and_rounding():
    target = torch.tensor([1.0, -2.0], dtype=torch.float64)
    eager = torch.tensor([1.0, -2.001])
    rounding = 4 * torch.finfo(torch.float32).eps * 2
    row = verdict(torch.tensor([1.0019, -2.0]), target, eager)
    assert row.problem is None
    assert row.budget == pytest.approx(0.002 + rounding, rel=1e-3)
    assert verdict(torch.tensor([1.0021, -2.0]), target, eager).problem is not None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.tensor([1.0, math.nan]), "1 of 2 wrong, first at [1]: expected 2, got nan"),
        (torch.tensor([1.0, math.inf]), "1 of 2 wrong, first at [1]: expected 2, got inf"),
        (torch.tensor([1.0]), "is torch.float32 [1]; expected torch.float32 [2]"),
        (torch.tensor([1.0, 2.0], dtype=torch.float16), "is torch.float16 [2]; expected torch.float32 [2]"),
    ],
)
def test_what_is_no_number_or_no_match_fails(value, problem):
    assert verdict(value, torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.0])).problem == problem


def test_eager_overflow_excuses_nothing():
    target = torch.tensor([1.0], dtype=torch.float64)
    assert verdict(torch.tensor([1.1]), target, torch.tensor([math.inf])).problem is not None
    assert verdict(torch.tensor([1.0]), target, torch.tensor([math.nan])).problem is None


def test_integers_must_agree():
    target = torch.tensor([3, 4])
    assert verdict(torch.tensor([3, 4]), target, target).problem is None
    assert verdict(torch.tensor([3, 5]), target, target).problem is not None


def tiny_workloads(kernels, device, quick):
    x = torch.zeros(10, device=device)
    providers = {"eager": lambda: lambda: x + 1, "compile": lambda: lambda: x.add(1)}
    return [Workload("tiny", ("rgb",), "10", "float32", 40, 0, "copy", providers)]


def benched(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "kernels.json"
    status = bench.main(["kernels", "--kernel", "rgb", "--device", DEVICE, "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def test_bench_refuses_a_broken_kernel(broken, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_kernels, "workloads", tiny_workloads)
    status, written = benched(tmp_path)
    out = capsys.readouterr().out
    assert status == 1
    assert "no speed-up: the check of rgb failed" in out
    assert "x eager" not in out
    assert written["check_failed"] == ["rgb"]
    assert not any("speedup" in row for row in written["rows"])


def test_bench_of_a_right_kernel(few_cases, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_kernels, "workloads", tiny_workloads)
    status, written = benched(tmp_path, "--picture", str(tmp_path / "kernels.png"))
    assert status == 0
    assert "x eager" in capsys.readouterr().out
    assert (tmp_path / "kernels.png").stat().st_size > 0
    row = written["rows"][0]
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["gbps"] == pytest.approx(40 / row["median_ms"] / 1e6)
    assert row["speedup"]["compile"] == pytest.approx(written["rows"][1]["median_ms"] / row["median_ms"])


def test_bench_starts_nothing_after_its_time(few_cases, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_kernels, "workloads", tiny_workloads)
    status, written = benched(tmp_path, "--seconds", "0")
    assert status == 0
    assert written["rows"] == []
    assert written["left_out"] == ["tiny, 10, float32"]


def test_targets_are_judged_on_an_h200_alone(monkeypatch):
    target = Target(most_us=100, over_eager=20, launches=1)
    work = Workload("w", (), "", "bfloat16", 1, 1, "matmul", {}, target)
    row = {"median_ms": 0.08, "share_of_ceiling": 0.5, "launches": 2, "speedup": {"eager": 15.0, "compile": 4.0}}
    assert bench_kernels.verdict(work, row, torch.device("cpu")) == "not measured: the target is for an H200"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    said = bench_kernels.verdict(work, row, torch.device("cuda"))
    assert said == "met 80.0 us (<= 100); MISSED 15.0x eager (>= 20); MISSED 2 launches (1)"


def test_missing_peer_and_failing_provider_are_notes():
    def failing():
        raise ValueError("too large")

    def missing():
        raise Unavailable("No module named 'peer'")

    work = Workload("w", (), "", "float32", 1, 0, "copy", {"a": failing, "b": missing})
    notes = [bench_kernels._row(work, name, torch.device(DEVICE), {"copy": 1.0})["note"] for name in "ab"]
    assert notes == ["ValueError: too large", "not installed: No module named 'peer'"]


WASTEFUL = """
import triton
import triton.language as tl

from kernels.backend import Launch, Specialisation


@triton.jit
def spilling(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b, c, d = tl.load(x + at), tl.load(x + BLOCK + at), tl.load(x + 2 * BLOCK + at), tl.load(x + 3 * BLOCK + at)
    total = tl.sum(a * b) + tl.sum(c * d)
    tl.store(y + at, a * total + b * tl.sum(a * c) + c * tl.sum(b * d) + d)


@triton.jit
def product(x, y, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(STEPS):
        left = tl.load(x + i * BLOCK * BLOCK + at[:, None] * BLOCK + at[None, :])
        right = tl.load(y + i * BLOCK * BLOCK + at[:, None] * BLOCK + at[None, :])
        total = tl.dot(left, right, total, input_precision="tf32")
    tl.store(y + at[:, None] * BLOCK + at[None, :], total)


def specialisations(arch):
    memory = {"x": "*fp32", "y": "*fp32"}
    return [
        Specialisation("spilling", spilling, memory, {}, Launch({"BLOCK": 4096}, 1, 2)),
        Specialisation("modest", spilling, memory, {}, Launch({"BLOCK": 128}, 4, 2)),
        Specialisation("too large", product, memory, {"STEPS": 64}, Launch({"BLOCK": 128}, 8, 4)),
        Specialisation("incomplete", spilling, {"x": "*fp32"}, {}, Launch({"BLOCK": 128}, 4, 2)),
    ]
"""


def test_compiling_ahead_finds_spills_and_shared_memory(tmp_path):
    (tmp_path / "wasteful.py").write_text(WASTEFUL)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    command = [sys.executable, "-m", "profiling.aot", "wasteful", "--arch", "80", "--json", str(tmp_path / "aot.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    written = json.loads((tmp_path / "aot.json").read_text())
    problems = {row["kernel"]: row["problem"] for row in written["rows"]}
    assert problems["modest"] is None
    assert problems["spilling"].startswith("spills: ")
    assert "bytes of shared memory; a block of sm_80 has 166912" in problems["too large"]
    assert "leaves out y" in problems["incomplete"]
    assert written["failed"] == 3


def test_resource_report_is_read():
    report = (
        "Function f:\n  REG:64 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:584\nFunction g:\n  REG:32 STACK:8 SHARED:0 LOCAL:4 CONSTANT[0]:1\n"
    )
    assert aot.read_resources(report) == {"registers": 64, "stack": 8, "local": 4}
    with pytest.raises(RuntimeError, match="names no function"):
        aot.read_resources("")


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (check.main, ["--kernel", "softmax"], "invalid choice: 'softmax'"),
        (check.main, ["--device", "tpu"], "invalid choice: 'tpu'"),
        (check.main, ["--case", "n=2"], "--case needs --in-process"),
        (check.main, ["--in-process", "--device", DEVICE, "--case", "nowhere", "--kernel", "rgb"], "no case of rgb has this in its name"),
        (bench.main, ["kernels", "--kernel", "softmax"], "invalid choice: 'softmax'"),
        (bench.main, ["softmax"], "invalid choice: 'softmax'"),
        (suite.main, [], "--out"),
        (
            suite.main,
            ["--out", "out", "--device", "cpu", "--parts", "tiers"],
            "--parts tiers: on cpu there are environment check kernels train",
        ),
    ],
)
def test_bad_options_are_named(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_cpu_check_without_interpreter_says_what_to_set(monkeypatch, capsys):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(SystemExit):
        check.main(["--in-process", "--device", "cpu"])
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err


def test_compiling_ahead_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        aot.main([])
    assert "unset it" in capsys.readouterr().err


def test_cases_have_names_of_their_own_and_repeatable_inputs(capsys):
    assert check.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(set(listed)) == len(listed) > 60
    case = cases.REGISTRY["vq_assign"]()[1]
    assert torch.equal(case.inputs()["x"], case.inputs()["x"])


def part(name: str, program: str, limit: float = 30, **settings) -> suite.Part:
    """A part of the suite that runs this Python program."""
    return suite.Part(name, shlex.join(["-c", program]), limit, **settings)


def run_suite(monkeypatch, out: Path, parts: list[suite.Part], *arguments: str) -> tuple[int, dict[str, dict]]:
    """Exit status, and what `summary.json` says of each part."""
    monkeypatch.setattr(suite, "PARTS", parts)
    status = suite.main(["--out", str(out), "--device", DEVICE, *arguments])
    written = json.loads((out / "summary.json").read_text())
    assert {"machine", "versions", "git_commit"} <= written.keys()
    return status, {entry["part"]: entry for entry in written["parts"]}


def test_suite_goes_on_after_a_failure(monkeypatch, tmp_path, capsys):
    parts = [
        part("wrong", "print('it broke'); raise SystemExit(3)"),
        part("slow", "import time; time.sleep(60)", 0.5),
        part("absent", "", needs=("no_such_module.part",)),
        part("elsewhere", "", devices=()),
        part("right", "open(r'{out}/made', 'w').write('{device}')"),
    ]
    status, entries = run_suite(monkeypatch, tmp_path / "out", parts)
    assert status == 1
    assert {name: entry["failed"] for name, entry in entries.items()} == {"wrong": True, "slow": True, "absent": False, "right": False}
    assert "status 3" in entries["wrong"]["outcome"]
    assert "not done after" in entries["slow"]["outcome"]
    assert "no_such_module.part not installed" in entries["absent"]["outcome"]
    assert {"seconds", "command", "git_commit"} <= entries["right"].keys()
    assert (tmp_path / "out" / "made").read_text() == DEVICE
    assert "it broke" in capsys.readouterr().out


def test_suite_resumes_with_what_is_missing(monkeypatch, tmp_path):
    count = "open(r'{out}/ran', 'a').write('%s ')"
    parts = [part("first", count % "first"), part("second", count % "second" + "; raise SystemExit(1)"), part("third", count % "third")]
    assert run_suite(monkeypatch, tmp_path, parts, "--parts", "second", "first")[0] == 1
    assert (tmp_path / "ran").read_text() == "first second "
    mended = [parts[0], part("second", count % "mended"), parts[2]]
    status, entries = run_suite(monkeypatch, tmp_path, mended, "--resume")
    assert status == 0
    assert (tmp_path / "ran").read_text() == "first second mended third "
    assert [(name, entry["outcome"]) for name, entry in entries.items()] == [(each.name, "passed") for each in parts]
    status, entries = run_suite(monkeypatch, tmp_path, mended, "--parts", "first")  # without --resume it begins anew
    assert (status, list(entries)) == (0, ["first"])


def test_suite_does_not_resume_another_device(monkeypatch, tmp_path, capsys):
    run_suite(monkeypatch, tmp_path, [part("first", "")])
    written = json.loads((tmp_path / "summary.json").read_text())
    written["machine"]["device"] = "tpu"
    (tmp_path / "summary.json").write_text(json.dumps(written))
    with pytest.raises(SystemExit):
        run_suite(monkeypatch, tmp_path, [part("first", "")], "--resume")
    assert f"is of tpu, this run of {DEVICE}" in capsys.readouterr().err


def test_suite_keeps_within_its_minutes(monkeypatch, tmp_path):
    parts = [part("long", "import time; time.sleep(60)"), part("late", "open(r'{out}/late', 'w')")]
    status, entries = run_suite(monkeypatch, tmp_path, parts, "--minutes", "0.05")
    assert status == 1
    assert entries["long"]["outcome"].startswith("FAILED: not done after ")
    assert entries["late"]["outcome"] == "left out: no time left; use --resume"
    assert not (tmp_path / "late").exists()
    status, entries = run_suite(monkeypatch, tmp_path, parts, "--resume", "--minutes", "0")
    assert status == 0
    assert entries["long"]["failed"]  # the earlier entry is kept
    assert run_suite(monkeypatch, tmp_path, parts, "--resume", "--parts", "late")[1]["late"]["outcome"] == "passed"


def test_suite_gives_its_cache_to_every_part(monkeypatch, tmp_path):
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    shown = f"import os; print(*(os.environ[name] for name in {names}))"
    assert run_suite(monkeypatch, tmp_path, [part("a", shown), part("b", shown)], "--cache", str(tmp_path / "cache"))[0] == 0
    for log in ("a.log", "b.log"):
        assert (tmp_path / log).read_text().split() == [str(tmp_path / "cache" / name) for name in ("inductor", "triton")]


def test_parts_of_the_suite():
    names = {device: [each.name for each in suite.PARTS if device in each.devices] for device in suite.DEVICES}
    assert names["cuda"] == ["environment", "check", "tests", "tier1", "kernels", "tiers", "ladder"]
    assert names["cpu"] == ["environment", "check", "kernels", "train"]
    benches = {"train": bench_train, "kernels": bench_kernels}
    for each in suite.PARTS:
        words = each.words(Path("out"), each.devices[0], quick=True)
        if words[1] == "profiling.bench":  # its options exist
            parser = argparse.ArgumentParser()
            benches[words[2]].add_options(parser)
            assert parser.parse_args(words[3:]).quick


def test_ceilings_are_measured_and_tf32_is_as_before(monkeypatch, tmp_path, capsys):
    before = torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(ceilings, "measure", lambda call, device: (call(), 2.0, 2.0)[1:] * 2)
    assert ceilings.main(["--device", DEVICE, "--json", str(tmp_path / "environment.json")]) == 0
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["copy_gbps"] == pytest.approx(2 * (2**30 if DEVICE == "cuda" else 2**28) / 2e6)
    assert {"fp32", "bf16"} <= written["matmul_tflops"].keys()
    assert torch.backends.cuda.matmul.allow_tf32 == before
    assert "TFLOP/s" in capsys.readouterr().out


def test_harness_needs_little_but_pytorch():
    missing = ("dm_control", "mujoco", "torchrl", "tensordict", "tyro", "wandb", "rich", "matplotlib", "vector_quantize_pytorch", "torchjd")
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {missing!r}:
            raise ModuleNotFoundError(f'{{name}} is not installed here', name=name)
sys.meta_path.insert(0, Absent())
import profiling.suite, profiling.ceilings, profiling.check, profiling.bench, profiling.aot
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
