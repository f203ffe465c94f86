"""A bar for commands that go through episodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def episode_bar(what: str, show: bool, episodes: int | None = None) -> Iterator[Callable[[int], None]]:
    """Draw a bar with frames per second; yields a function to call with the number of frames of each episode that is done.

    Args: what: is being done; show: draw it; episodes: to do, None where their number is not known.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("episodes"), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not show) as bar:
        task = bar.add_task(what, total=episodes, rate="")
        began = time.perf_counter()
        done = 0

        def advance(frames: int) -> None:
            nonlocal done
            done += frames
            bar.update(task, advance=1, rate=f"{done / (time.perf_counter() - began):.0f} frames/s")

        yield advance
