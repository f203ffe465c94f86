"""The command line shared by `collect`, `train` and `evaluate`: presets, flat flags, and errors without tracebacks."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from aime_fast.config import PRESETS, RENAMED, Config, preset
from aime_fast.errors import UserError

T = TypeVar("T")

_NEW_FLAGS = {f"--{old}".replace("_", "-"): f"--{new}".replace("_", "-") for old, new in RENAMED.items()}


def parse_arguments(cls: type[T], prog: str, description: str, argv: Sequence[str] | None = None, default: T | None = None) -> T:
    """Parse a dataclass from the command line.

    Nested dataclasses become groups in the help, their fields flat flags (`--latent-dim 18`), booleans bare ones
    (`--resume`, `--no-resume`); a bare `--compile` is `--compile best`. `default` supplies every value that is not given; without
    it the class's own defaults do.
    A bad argument prints what was expected and leaves with status 2; `--help` leaves with 0.
    """
    import tyro

    argv = _spell_out(sys.argv[1:] if argv is None else argv)
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    given = {} if default is None else {"default": default}
    return tyro.cli(cls, prog=prog, description=description, args=argv, config=flat, **given)


def _spell_out(words: Sequence[str]) -> list[str]:
    """Flags under the names that they have now; `--compile` without a value becomes `--compile best`."""
    spelt: list[str] = []
    for word, following in zip(words, [*words[1:], "--"]):
        flag, equals, value = word.partition("=")
        if (new := _NEW_FLAGS.get(flag.replace("_", "-"))) is not None:
            print(f"{flag} is called {new} now; the old name goes with the next version", file=sys.stderr)
            word = new + equals + value
        spelt += [word, "best"] if word == "--compile" and following.startswith("-") else [word]
    return spelt


def tier_from(argv: Sequence[str] | None, default: str) -> str:
    """The value of `--tier` in `argv` (None: `sys.argv`), or `default`. Leaves with status 2 if there is no such tier."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tier", default=default)
    tier = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))[0].tier
    if tier not in PRESETS:
        fail(f"--tier {tier}: there is no such tier; choose one of {', '.join(PRESETS)}")
    return tier


def parse_config(prog: str, description: str, argv: Sequence[str] | None = None, default_tier: str = "1") -> Config:
    """A whole `Config`: the preset of `--tier`, with every field settable as a flat flag.

    Args:
        prog: the command as the user types it, for usage lines.
        description: first paragraph of `--help`.
        argv: arguments without the program's name; None reads `sys.argv`.
        default_tier: tier taken without `--tier`.
    """
    return parse_arguments(Config, prog, description, argv, default=preset(tier_from(argv, default_tier)))


def fail(message: object, status: int = UserError.status) -> NoReturn:
    """Print `error: message` on stderr and leave with `status`."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def run_command(main: Callable[[], object]) -> None:
    """Call `main()`; turn errors that the user can fix into one line on stderr and their exit status, Ctrl-C into status 130.

    These are `UserError` and `FileNotFoundError`; any other error is a fault of the program and keeps its traceback. SIGTERM, which
    batch systems send, is treated like Ctrl-C unless `main` installs a handler of its own.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        fail(error, error.status)
    except FileNotFoundError as error:
        fail(error)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
