"""What a run has compiled, in one file that travels to other machines of the same kind: a job array compiles once."""

from __future__ import annotations

from pathlib import Path

import torch

from aime_fast.errors import ConfigError
from aime_fast.runtime.files import replacing


def load_compiled(path: str | Path) -> None:
    """Makes code that another process compiled known to this one; does nothing where there is no file yet.

    It is a cache: what fits neither the code nor the machine is compiled anew. Like a checkpoint of PyTorch it may run what it holds, so
    take none from strangers. Raises ConfigError where the file holds something else, or could not be written later.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigError(f"--compile-cache {path}: there is no folder {path.parent}; make it or name another")
    if not path.exists():
        return
    try:
        known = torch.compiler.load_cache_artifacts(path.read_bytes())
    except Exception as error:
        raise ConfigError(f"--compile-cache {path}: not what a run has compiled ({error}); delete it or name another") from None
    if known is None:
        raise ConfigError(f"--compile-cache {path}: nothing in it can be read; delete it or name another")


def save_compiled(path: str | Path) -> None:
    """Writes all that this process compiled, or found in a cache, to the file; does nothing where that is nothing. Raises OSError."""
    found = torch.compiler.save_cache_artifacts()
    if found is None:
        return
    with replacing(path) as file:
        file.write(found[0])
