"""Which of TorchRL's collectors plays the episodes: in processes of this machine, over torch.distributed, or on a Ray cluster.

The three differ in where a worker runs and how its frames travel. What a worker plays is in its environment, so it is the same everywhere.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from tensordict.nn import TensorDictModuleBase

from aime_fast.config import Backend
from aime_fast.errors import DataError, stop_signals
from aime_fast.runtime.processes import begin_worker

if TYPE_CHECKING:
    from torchrl.collectors import BaseCollector
    from torchrl.envs import EnvBase

MakeEnvironment = Callable[[], "EnvBase"]
MakePolicy = Callable[[], TensorDictModuleBase]  # the policy of a worker; it is called in the worker's process
WORKER = {"trust_policy": True, "auto_register_policy_transforms": False}  # arguments of the collector in each worker
ENDLESS = 2**62  # frames; TorchRL 0.14 documents -1 for that, with which its distributed collectors and those of Ray yield nothing
_SEE = "pass --backend local --workers 1 to see its error"
_ENDED_AT_START = f"a worker process ended while it started; {_SEE}, or fewer --workers where memory runs out"
START_SECONDS = 600  # until the workers of a cluster are up, which may start machines for them


class WorkerError(Exception):
    """A process of the collector has ended."""


def check_backend(backend: Backend) -> None:
    """Raise DataError where what the backend needs is not installed."""
    if backend == "ray" and importlib.util.find_spec("ray") is None:
        raise DataError("--backend ray: Ray is not installed; pip install 'aime_fast[ray]', or pass --backend local")


@contextmanager
def open_collector(
    backend: Backend, environments: Sequence[MakeEnvironment], make_policy: MakePolicy, frames: int
) -> Iterator[BaseCollector]:
    """A TorchRL collector with a worker for each environment, always shut down: the interpreter cannot exit while one runs.

    It yields messages [workers, frames], or [frames] from a local worker that is alone and plays in this process. A worker that ends
    raises WorkerError, while it starts too; a cluster that does not answer or has no room for the workers, DataError.
    """
    collector = {"local": _local, "distributed": _distributed, "ray": _ray}[backend](environments, make_policy, frames)
    atexit.register(collector.shutdown)
    try:
        yield collector
    finally:
        atexit.unregister(collector.shutdown)
        collector.shutdown()


def messages(collector: BaseCollector) -> Iterator[Any]:
    """What a collector yields. Raises WorkerError if a worker has ended; TorchRL raises several kinds of errors then."""
    try:
        yield from collector
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        if not isinstance(error, DataError):
            _raise_if_ended(getattr(collector, "procs", ()), error)
        raise


def _local(environments: Sequence[MakeEnvironment], make_policy: MakePolicy, frames: int) -> BaseCollector:
    from torchrl.collectors import Collector, MultiSyncCollector

    workers = len(environments)
    if workers == 1:
        return Collector(environments[0], policy_factory=make_policy, frames_per_batch=frames, total_frames=-1, **WORKER)
    try:
        return MultiSyncCollector(
            environments,
            policy_factory=[make_policy] * workers,
            frames_per_batch=frames * workers,
            total_frames=-1,
            cat_results="stack",
            init_fn=partial(begin_worker, os.getpid()),
            **WORKER,
        )
    except (RuntimeError, OSError, EOFError) as error:
        _raise_if_a_child_ended(error)
        raise


def _distributed(environments: Sequence[MakeEnvironment], make_policy: MakePolicy, frames: int) -> BaseCollector:
    """TorchRL's DistributedCollector, whose processes are on this machine and send frames by gloo.

    Its own shutdown waits for workers that may be gone, and its process group for a worker that never comes: for 1000 days. The other
    one, DistributedSyncCollector, receives the frames of all workers into the same memory.
    """
    from torch import distributed
    from torchrl.collectors.distributed import DistributedCollector

    class Distributed(DistributedCollector):
        jobs = ()

        def __init__(self, *arguments: Any, **options: Any):
            try:
                super().__init__(*arguments, **options)
            except BaseException:
                self.shutdown()
                raise

        def _init_master_dist(self, *arguments: Any) -> None:
            _while_they_live(self.jobs, partial(super()._init_master_dist, *arguments))

        def iterator(self) -> Iterator[Any]:
            try:
                yield from super().iterator()
            except RuntimeError as error:  # of gloo, whose connection was closed
                _raise_if_ended(self.jobs, error)
                raise

        def shutdown(self, timeout: float | None = None) -> None:
            for job in self.jobs:
                job.kill()  # it waits for orders, and owns nothing but its simulator
            for job in self.jobs:
                job.join()
            if distributed.is_initialized():
                distributed.destroy_process_group()

    workers = len(environments)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return Distributed(
        [_OfWorker(make) for make in environments],
        policy_factory=[make_policy] * workers,
        frames_per_batch=frames * workers,
        total_frames=ENDLESS,
        sync=True,
        launcher="mp",
        tcp_port=port,
        collector_kwargs=WORKER,
        weight_sync_schemes={},
    )


class _OfWorker:
    """Makes the environment of a worker, and ties the process that receives it to this one: see `begin_worker`."""

    def __init__(self, make: MakeEnvironment):
        self.make = make

    def __call__(self) -> EnvBase:
        return self.make()

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (os.getpid(), self.make)


def _received(parent: int, make: MakeEnvironment) -> MakeEnvironment:
    begin_worker(parent)
    return make


def _while_they_live(processes: Sequence[Any], connect: Callable[[], None]) -> None:
    """Call `connect`, which waits for these processes. Raises its error, or WorkerError as soon as one has ended."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            connect()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)  # left waiting where a process has ended, it does not keep the interpreter
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.1)
        if any(process.exitcode is not None for process in processes):
            raise WorkerError(_ENDED_AT_START)
    if failed:
        raise failed[0]


def _ray(environments: Sequence[MakeEnvironment], make_policy: MakePolicy, frames: int) -> BaseCollector:
    """TorchRL's RayCollector, on the cluster that RAY_ADDRESS names, or on one of this machine alone that ends with it."""
    import ray
    from torchrl.collectors.distributed import RayCollector

    workers, address = len(environments), os.environ.get("RAY_ADDRESS")

    def ended(error: Exception) -> WorkerError:
        reason = (str(error).splitlines() or [""])[-1]
        return WorkerError(f"a worker on Ray has ended ({reason}); {_SEE}, or fewer --workers where memory runs out")

    class OnRay(RayCollector):
        def add_collectors(self, *arguments: Any) -> None:
            super().add_collectors(*arguments)
            begun = [worker.__ray_ready__.remote() for worker in self.remote_collectors]
            up, _ = ray.wait(begun, num_returns=workers, timeout=START_SECONDS)
            if len(up) < workers:
                processors = ray.cluster_resources().get("CPU", 0)
                self.shutdown()
                raise DataError(
                    f"--workers {workers}: {len(up)} of them run after {START_SECONDS} s; each takes one of the {processors:g} "
                    "processors of the Ray cluster, pass fewer"
                )

        def iterator(self) -> Iterator[Any]:
            self._weight_sync_initialized = True  # no weights are sent; TorchRL would warn of that
            try:
                yield from super().iterator()
            except ray.exceptions.RayError as error:
                raise ended(error) from error

    renderer = {name: os.environ[name] for name in ("MUJOCO_GL", "LP_NUM_THREADS") if name in os.environ}
    cluster = {} if address else {"address": "local", "num_cpus": workers, "include_dashboard": False}
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    try:
        _reach(address)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The policy is not an nn.Module")  # nor has it weights to send
            return OnRay(
                list(environments),
                policy_factory=[make_policy] * workers,
                frames_per_batch=frames * workers,
                total_frames=ENDLESS,
                sync=True,
                collector_kwargs=[dict(WORKER) for _ in environments],
                weight_sync_schemes={},
                remote_configs={"num_cpus": 1, "num_gpus": 0},
                ray_init_config={**cluster, "runtime_env": {"env_vars": renderer}, "log_to_driver": False, "logging_level": "error"},
            )
    except SystemExit as error:  # of Ray's own handler of SIGTERM
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        raise KeyboardInterrupt from error
    except DataError:
        raise
    except ray.exceptions.RayError as error:
        raise ended(error) from error
    except Exception as error:  # Ray has no class for what happens here
        where = f"the cluster at RAY_ADDRESS={address} does not answer" if address else "Ray does not start on this machine"
        raise DataError(f"--backend ray: {where} ({(str(error).splitlines() or [''])[0]}); pass --backend local") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _reach(address: str | None) -> None:
    """Raise OSError unless something listens at `address`; Ray itself goes on trying for a quarter of an hour."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _raise_if_ended(processes: Sequence[Any], error: Exception) -> None:
    for process in processes:
        with contextlib.suppress(ValueError):  # raised by a process that was closed
            process.join(timeout=1)
            if process.exitcode:
                how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"status {process.exitcode}"
                raise WorkerError(
                    f"a worker process was ended by {how}; the system does that when memory runs out, pass fewer --workers"
                    if process.exitcode < 0
                    else f"a worker process ended with {how} ({(str(error).splitlines() or [''])[-1]}); {_SEE}"
                ) from error


def _raise_if_a_child_ended(error: Exception) -> None:
    """Raise WorkerError if what ended the making of a collector is that one of its processes is gone, which `error` does not always say."""
    gone = isinstance(error, EOFError) or isinstance(error.__cause__, EOFError) or isinstance(error, (BrokenPipeError, ConnectionError))
    if gone:
        raise WorkerError(_ENDED_AT_START) from error
