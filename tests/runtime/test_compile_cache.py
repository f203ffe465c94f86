"""What one process compiles, another one finds in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aime_fast.errors import ConfigError
from aime_fast.runtime.compile_cache import load_compiled

PROGRAM = """
import os
import sys
import torch
import torch._inductor.compile_fx
from torch._dynamo.utils import counters
from torch._inductor import cpu_vec_isa
from aime_fast.runtime.compile_cache import load_compiled, save_compiled
cpu_vec_isa.pick_vec_isa()  # compiles a trial of each
for name in ("first", "second"):  # processes that share what is imported and nothing else, each with an Inductor cache of its own
    if (child := os.fork()) == 0:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = name
        load_compiled("compiled")
        torch.compile(lambda x: (x.sin() * 2 + x.cos()).sum())(torch.ones(1000))
        save_compiled("compiled")
        print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"], flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


def test_a_second_process_compiles_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (0, "0 1\n1 0\n"), done.stderr
    assert (tmp_path / "first").is_dir()


def test_a_file_of_something_else_and_a_missing_folder_are_named(tmp_path):
    for content in (b"", b"no cache"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ConfigError, match=r"--compile-cache .*other"):
            load_compiled(tmp_path / "other")
    with pytest.raises(ConfigError, match="there is no folder"):
        load_compiled(tmp_path / "missing" / "compiled")
    load_compiled(tmp_path / "not yet")
