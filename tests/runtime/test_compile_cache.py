"""What one process compiles, another one finds in a file."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from aime_fast.errors import ConfigError
from aime_fast.runtime.compile_cache import load_compiled

PROGRAM = """
import sys
import torch
from torch._dynamo.utils import counters
from aime_fast.runtime.compile_cache import load_compiled, save_compiled
load_compiled(sys.argv[1])
torch.compile(lambda x: (x.sin() * 2 + x.cos()).sum())(torch.ones(1000))
save_compiled(sys.argv[1])
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def test_a_second_process_compiles_nothing(tmp_path):
    found = []
    for name in ("first", "second"):  # with an Inductor cache of its own
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name)}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "compiled")]
        found.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert found == ["0 1\n", "1 0\n"]


def test_a_file_of_something_else_and_a_missing_folder_are_named(tmp_path):
    for content in (b"", b"no cache"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ConfigError, match=r"--compile-cache .*other"):
            load_compiled(tmp_path / "other")
    with pytest.raises(ConfigError, match="there is no folder"):
        load_compiled(tmp_path / "missing" / "compiled")
    load_compiled(tmp_path / "not yet")
