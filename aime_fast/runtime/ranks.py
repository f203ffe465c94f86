"""The processes of a run, one a device, as `torchrun` starts them: each has its share of every batch, and all make the same update.

An update of N ranks is that of one process with the whole batch. Rank r of N has the sequences r, r + N, r + 2N, ... of a batch. All
draw the same random numbers for the whole batch and keep those of their sequences (`draw`), gradients and means over the batch are
averaged (`mean`) and sums added (`total`) before anything is done with them, so weights, codebooks and optimizers stay the same bits on
every rank without ever being sent.

Outside of `sharing` a rank draws the random numbers of a task as if it were alone. It infers the latents of some episodes (`gathered`) and
validates on some batches (`collected`). With one rank nothing here does anything.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from aime_fast.errors import ConfigError, Interrupted, RankError
from aime_fast.runtime import streams

T = TypeVar("T")

PATIENCE = timedelta(hours=6)  # for a rank that is busy, as with recording data; one that has ended is noticed at once
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them


class Ranks(NamedTuple):
    """Which of the processes this is, and how many there are."""

    rank: int = 0
    size: int = 1

    def own(self, x: Tensor, dim: int = 0) -> Tensor:
        """The share of this rank of something whose axis `dim` is the sequences of a whole batch: a view."""
        return x if self.size == 1 else x[(slice(None),) * dim + (slice(self.rank, None, self.size),)]


@dataclasses.dataclass
class Traffic:
    """Messages of this process to the others, their bytes, and the seconds in them and in waiting; on a GPU, until they are queued."""

    messages: int = 0
    bytes: int = 0
    seconds: float = 0.0


traffic = Traffic()
_run = Ranks()
_sharing = Ranks()  # `_run` within `sharing`
_halves = False  # gradients of fp32 are sent as bf16


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch() -> str | None:
    """The identity of what `torchrun` was asked to run, the same after it has started the processes anew; None without it."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def restarted() -> bool:
    """Whether `torchrun --max-restarts` has started the processes anew."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def local_device(name: str) -> str:
    """The device of `--device` for this process of its machine: `cuda` and `auto` become a GPU of its own. Raises ConfigError."""
    if launched() and name.startswith("cuda:"):
        raise ConfigError(f"--device {name}: each of the processes needs a GPU of its own; pass --device cuda")
    if not launched() or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def joined(device: torch.device, messages: str = "fp32") -> Iterator[None]:
    """Within it this process is one of those that a launcher started; NCCL joins GPUs, gloo joins processors.

    messages: what gradients of fp32 are sent as, fp32 or bf16.

    Raises ConfigError where the launcher left something out, RankError where the others are not there.
    """
    global _run, _halves
    if not launched():
        yield
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise ConfigError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} are not set: start the run with torchrun")
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _answering():
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        # After a restart torchrun's store still has the addresses of the processes before it (github.com/pytorch/pytorch/issues/135712).
        store = dist.PrefixStore(f"start {_restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    _run, _halves = Ranks(dist.get_rank(), dist.get_world_size()), messages == "bf16"
    try:
        yield
        wait()
    except Interrupted:
        with suppress(RankError):  # one that is gone needs no waiting for
            wait()  # a launcher that sees one process end sends the others a second signal, which would cut off what they are saving
        raise
    finally:
        _run = Ranks()
        dist.destroy_process_group()


def of_run() -> Ranks:
    """All processes of the run, whatever is shared just now."""
    return _run


def leads() -> bool:
    """Whether this process is the one that writes and reports."""
    return _run.rank == 0


@contextmanager
def sharing() -> Iterator[None]:
    """Within it a batch is this rank's share of one."""
    global _sharing
    before, _sharing = _sharing, _run
    try:
        yield
    finally:
        _sharing = before


def size() -> int:
    """How many ranks share a batch just now."""
    return _sharing.size


def rank() -> int:
    """Which of them this is."""
    return _sharing.rank


def own(x: Tensor, dim: int = 0) -> Tensor:
    """See `Ranks.own`; everything outside of `sharing`."""
    return _sharing.own(x, dim)


def draw(make: Callable[[list[int]], Tensor], shape: torch.Size | tuple[int, ...], dim: int = 0) -> Tensor:
    """Random numbers of a shape whose axis `dim` is this rank's sequences: what `make(shape)` gives for them in the whole batch."""
    whole = list(shape)
    whole[dim] *= _sharing.size
    return own(make(whole), dim)


def rand(*shape: int, dim: int = 0, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.rand` by `draw`."""
    return draw(lambda whole: torch.rand(whole, device=device, dtype=dtype), shape, dim)


def randn_like(x: Tensor) -> Tensor:
    """Normal random numbers like x [B, ...], by `draw`."""
    return draw(lambda whole: torch.randn(whole, device=x.device, dtype=x.dtype), x.shape)


def exponential_like(x: Tensor) -> Tensor:
    """Exponential random numbers like x [B, ...], by `draw`."""
    return draw(lambda whole: x.new_empty(whole).exponential_(), x.shape)


def total(x: Tensor) -> Tensor:
    """The sum over the ranks that share a batch, without gradient; x itself where there is one."""
    if _sharing.size == 1:
        return x
    return _reduced(x.detach().clone())


def mean(x: Tensor) -> Tensor:
    """The mean over the ranks that share a batch, without gradient; x itself where there is one."""
    return x if _sharing.size == 1 else total(x) / _sharing.size


class Averages:
    """`mean` in place of several gradients, each sent as soon as it is complete, beside the work that follows.

    All ranks begin the same ones in the same order. On a GPU a message waits for the stream that was current when it began, and the
    stream that is current in `wait` waits for it; the host does not, so both may be captured. By gloo the host waits.
    """

    def __init__(self):
        self._begun: list[tuple[Tensor, Tensor, dist.Work]] = []  # gradients, what is sent of them, the message

    def begin(self, x: Tensor) -> None:
        """Send gradients x, a contiguous tensor, as `joined` was told. Until `wait` nothing may read or change them."""
        if _sharing.size > 1:
            sent = x.bfloat16() if _halves and x.dtype == torch.float32 else x
            self._begun.append((x, sent, _begun(sent)))

    def wait(self) -> None:
        """Until all that were begun are means. Raises RankError where another rank does not answer."""
        for x, sent, message in self._begun:
            with _in_traffic():
                message.wait()
            streams.record(sent)
            x.copy_(sent).div_(_sharing.size)  # nothing is copied where it was sent as it is
        self._begun.clear()


def average_(x: Tensor) -> Tensor:
    """`Averages` of gradients x alone, for which there is nothing to do meanwhile; returns them."""
    averages = Averages()
    averages.begin(x)
    averages.wait()
    return x


def means(scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`mean` of each of the scalars, all of them in one message."""
    if _sharing.size == 1:
        return dict(scalars)
    averaged = mean(torch.stack([value.detach().double() for value in scalars.values()]))
    return {name: value.to(given.dtype) for (name, given), value in zip(scalars.items(), averaged)}


def gathered(x: Tensor, rows: Tensor, share: Ranks) -> Tensor:
    """Groups of rows, of which rank r of N has the groups r, r + N, ...: those of all ranks in order, the same bits on each.

    Args: x [R, ...], the rows of this rank's groups, one after the other; rows int64 [G], of each group, whosever it is.
    """
    if share.size == 1:
        return x
    own = (torch.arange(len(rows)) % share.size == share.rank).repeat_interleave(rows)
    whole = x.new_zeros(len(own), *x.shape[1:])
    whole[own.to(x.device)] = x
    return _reduced(whole)  # the others have zeros there


def collected(values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each process of the run has, in their order, by names of its own; of several processes on the CPU."""
    return [values] if _run.size == 1 else told({name: value.cpu() for name, value in values.items()})


def told(mine: T) -> list[T]:
    """What each process of the run tells the others, in their order: anything that can be pickled."""
    everything = [mine] * _run.size
    if _run.size > 1:
        with _answering():
            dist.all_gather_object(everything, mine)
    return everything


def neighbours() -> list[int]:
    """The processes of the run, this one among them, that run on this machine and can open each other's files.

    They find out by themselves: each launcher has other variables for it (LOCAL_RANK of torchrun, SLURM_LOCALID of srun).
    """
    places = told(_place())
    return [rank for rank, place in enumerate(places) if place == places[_run.rank]]


def _place() -> tuple[str, ...]:
    """Of the processes that see each other under /proc; without it each has a place of its own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return "process", str(_run.rank)


@contextmanager
def failing_together() -> Iterator[None]:
    """An error within it, in any process of the run, ends it in all: with that error there, with a RankError that quotes it elsewhere."""
    error = None
    try:
        yield
    except BaseException as caught:  # of a signal too: the others wait in a message, where they hear none
        error = caught
    try:
        reasons = told(None if error is None else str(error) or type(error).__name__)
    except RankError:
        if error is None:
            raise
    if error is not None:
        raise error
    if failed := [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]:
        raise RankError("process {} of this run has failed: {}".format(*failed[0]))


def anywhere(*flags: bool) -> list[bool]:
    """Whether each of the flags is set in any process of the run. The host waits for all; the devices go on."""
    if _run.size == 1:
        return list(flags)
    return _reduced(torch.tensor(flags, dtype=torch.int64), dist.ReduceOp.MAX).bool().tolist()  # on the CPU: by gloo


def wait() -> None:
    """Until all processes of the run have come here."""
    anywhere(False)


def alike(number: int) -> bool:
    """Whether a number, below 2^62 in size, is the same in all processes of the run."""
    if _run.size == 1:
        return True
    most, least = _reduced(torch.tensor([number, -number]), dist.ReduceOp.MAX).tolist()
    return most == -least


@contextmanager
def leader_first() -> Iterator[None]:
    """What is within is done by rank 0, and then by the others, which find what it has left on the disk."""
    if not leads():
        wait()
    yield
    if leads():
        wait()


def _reduced(x: Tensor, how: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """x, in place, over all ranks."""
    with _in_traffic():
        dist.all_reduce(x, how)
    _count(x)
    return x


def _begun(x: Tensor) -> dist.Work:
    """Begins the sum of x, in place, over all ranks."""
    with _in_traffic():
        message = dist.all_reduce(x, async_op=True)
    _count(x)
    return message


def _count(sent: Tensor) -> None:
    traffic.messages += 1
    traffic.bytes += sent.numel() * sent.element_size()


@contextmanager
def _in_traffic() -> Iterator[None]:
    """The time within is that of messages; where another rank does not answer, a RankError says so."""
    began = time.perf_counter()
    with _answering():
        yield
    traffic.seconds += time.perf_counter() - began


@contextmanager
def _answering() -> Iterator[None]:
    """Where another rank does not answer, a RankError says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of gloo; NCCL's are RuntimeErrors too
        reason = (str(error).splitlines() or [""])[0]
        raise RankError(
            f"another process of this run has ended or does not answer ({reason}); see what it said. The run goes on from its last "
            "checkpoint with --resume"
        ) from error
