"""How a fault can end, and the table of the campaign."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

VERDICTS = ("survived", "lost", "silent", "traceback")


class Problem(Exception):
    """A fault that was not survived.

    Args:
        verdict: "lost": work, or a file, or a folder is lost, something is left over, or the command hung; "silent": numbers differ
            without a message; "traceback": a Python traceback, or a signal that was not sent.
        seen: what was seen, one line.
    """

    def __init__(self, verdict: str, seen: object):
        super().__init__(f"{verdict}: {seen}")
        self.verdict, self.seen = verdict, " | ".join(str(seen).split("\n"))


@dataclass(frozen=True)
class Outcome:
    """One fault: its kind (a row of the table), which one it was, how it ended, what was seen, the command."""

    kind: str
    fault: str
    verdict: str = "survived"
    seen: str = ""
    command: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.verdict.upper()}  {self.kind}, {self.fault}: {self.seen}" + (f"\n    {self.command}" if self.command else "")


def attempt(kind: str, fault: str, action: Callable[[], object], command: str = "") -> Outcome:
    """The outcome of `action()`, which raises `Problem` where the fault was not survived. A text that it returns is what was seen.

    Any other exception, as of a file that is not there to be compared, is an outcome "lost".
    """
    began = time.monotonic()
    try:
        seen, verdict = action(), "survived"
    except Problem as problem:
        seen, verdict = problem.seen, problem.verdict
    except Exception as error:
        seen, verdict = Problem("lost", f"{type(error).__name__}: {error}").seen, "lost"
    return Outcome(kind, fault, verdict, seen if isinstance(seen, str) else "", command, round(time.monotonic() - began, 2))


def tally(outcomes: Iterable[Outcome]) -> dict[str, Counter[str]]:
    """Verdicts by kind, in the order in which kinds come."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.kind, Counter())[outcome.verdict] += 1
    return counts


def table(outcomes: Iterable[Outcome]) -> str:
    """Kind x (tried, survived, lost, silent, tracebacks) as Markdown, with the sums below."""
    counts = dict(sorted(tally(outcomes).items()))
    counts["all"] = sum(counts.values(), Counter())
    width = max(map(len, counts))
    lines = [f"| {'fault':<{width}} | tried | survived | lost | silent | tracebacks |", f"|{'-' * (width + 2)}|---|---|---|---|---|"]
    for kind, count in counts.items():
        lines.append(f"| {kind:<{width}} | {count.total()} | " + " | ".join(str(count[verdict]) for verdict in VERDICTS) + " |")
    return "\n".join(lines)
