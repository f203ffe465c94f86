"""The command line shared by `collect`, `train` and `evaluate`: presets, flat flags, and errors without tracebacks."""

from __future__ import annotations

import argparse
import os
import select
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn, TextIO, TypeVar

from aime_fast.config import PRESETS, RENAMED, Config, preset
from aime_fast.errors import Interrupted, RankError, UserError, explain, stop_signals

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
    _say(f"error: {message}")
    sys.exit(status)


def run_command(main: Callable[[], object]) -> None:
    """Call `main()` as the whole of a program: one line on stderr and an exit status for whatever ends it early, and no traceback.

    Status 2: `UserError` (or its own), an error of the operating system, too little memory. 130, 143, 129: Ctrl-C, SIGTERM, SIGHUP, unless
    `main` has handlers of its own. 141: nobody reads the output. 1: any other error is a fault of the program; the line says in which file
    its traceback is.
    """
    signals = _Signals()
    status = 1
    try:
        with signals:
            main()
        status = 0
    except SystemExit:
        raise
    except BaseException as error:
        status, line = _end(error, signals.received)
        if line:
            _say(f"{_whose()}{line}")
    finally:
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
    if status:
        sys.exit(status)


def _end(error: BaseException, received: int | None) -> tuple[int, str]:
    """The exit status and the line for an error that ends a command; `received` is the signal that came before it, if any."""
    if (lost := _lost_rank(error)) is not None:  # a launcher that sees one process end sends the others a signal
        return lost.status, f"error: {lost}"
    if received is not None or isinstance(error, KeyboardInterrupt):  # what follows a signal, as of workers that it ended, is its effect
        status = getattr(error, "status", 128 + signal.SIGINT) if isinstance(error, KeyboardInterrupt) else 128 + received
        said = str(error) if isinstance(error, KeyboardInterrupt) else ""
        return status, f"interrupted by {signal.Signals(status - 128).name}{f': {said}' if said else ''}"
    if isinstance(error, UserError):
        return error.status, f"error: {error}"
    if isinstance(error, OSError) and error.filename is None and _is_dead(sys.stdout):
        return 128 + (signal.SIGPIPE if isinstance(error, BrokenPipeError) else signal.SIGHUP), ""
    if isinstance(error, OSError):
        return UserError.status, f"error: {explain(error)}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        reason = (str(error).splitlines() or [""])[0]
        less = "free some, or take a smaller --batch-size, or --accumulate"
        return UserError.status, f"error: too little memory{f' ({reason})' if reason else ''}; {less}"
    return 1, f"error: {_describe(error)}"


def _describe(error: BaseException) -> str:
    """A fault of the program as one line, its traceback written to a file in the temporary folder."""
    what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    where = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{what} ({where.filename}, line {where.lineno})"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="aime_fast_error_", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(shlex.join(sys.argv) + "\n" + "".join(traceback.format_exception(error)))
    except OSError as failed:
        return f"{what}; a fault of the program, whose full traceback could not be written ({explain(failed)})"
    return f"{what}; this is a fault of the program, the full traceback is in {file.name}"


class _Signals:
    """While entered, SIGTERM, SIGHUP and Ctrl-C raise `Interrupted` once, after an import that they find; a second one ends the program.

    Signals that the process was started to ignore (nohup) are ignored further.
    """

    def __init__(self):
        self.received: int | None = None
        self._ignored_errors = sys.unraisablehook
        self._heeded: list[signal.Signals] = []
        self._repeat: threading.Timer | None = None

    def __enter__(self) -> None:
        self._heeded = stop_signals()
        if self._heeded:
            sys.unraisablehook = self._again
        for signum in self._heeded:
            signal.signal(signum, self._stop)

    def __exit__(self, *_) -> None:
        self._cancel()
        sys.unraisablehook = self._ignored_errors
        for signum in self._heeded:  # the program is at its end, where an exception would only be printed
            signal.signal(signum, signal.SIG_DFL)

    def _stop(self, signum: int, _frame: object) -> None:
        self._cancel()
        if _importing():  # C++ that initialises a module would abort at an exception
            self._send_again(signum)
            return
        self.received = signum
        for other in self._heeded:
            signal.signal(other, signal.SIG_DFL)
        raise Interrupted(signum)

    def _again(self, ignored) -> None:
        """Python drops an exception that is raised in a finaliser or a callback of a weak reference: raise it again outside of it."""
        if not isinstance(ignored.exc_value, Interrupted):
            self._ignored_errors(ignored)
            return
        signal.signal(self.received, self._stop)
        self._send_again(self.received)

    def _send_again(self, signum: int) -> None:
        self._repeat = threading.Timer(0.01, os.kill, (os.getpid(), signum))
        self._repeat.daemon = True
        self._repeat.start()

    def _cancel(self) -> None:
        if self._repeat is not None:
            self._repeat.cancel()


def _importing() -> bool:
    """Whether a module is being imported."""
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in list(sys.modules.values()))


def _lost_rank(error: BaseException | None) -> RankError | None:
    """The RankError that an error is, or came upon."""
    while error is not None and not isinstance(error, RankError):
        error = error.__context__
    return error


def _whose() -> str:
    """Of several processes of a run the first speaks for all, and another one gives its number."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _say(line: str) -> None:
    """Print on stderr, which may be gone."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _is_dead(stream: TextIO) -> bool:
    """Whether the other end of a pipe or a terminal is gone."""
    with suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0))
    return False


def _flush(stream: TextIO) -> None:
    """Write what is left in a stream; one that cannot be written any more is replaced by nothing, or Python would fail at its end."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
