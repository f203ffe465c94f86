"""dm_control as a source of frames: the renderer, a task with one picture per agent step, and the TorchRL environment around it.

Collection spends most of its time rendering on the CPU, so `render_quality="fast"` leaves out what a 64-pixel picture hardly
shows: anti-aliasing, shadows, reflections, and an offscreen buffer larger than the picture. `"full"` keeps dm_control's own
settings. The pictures differ, so the choice is recorded with the data.

dm_control picks its OpenGL backend when it is imported, so every function here calls `select_renderer` before importing it.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from aime_fast.config import DataConfig
from aime_fast.errors import DataError

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

BACKENDS = ("egl", "osmesa")
INSTALL_HINT = "on Debian or Ubuntu install it with: apt-get install -y --no-install-recommends libegl1 libgl1   (or libosmesa6)"

_PROBE = """
from dm_control import suite
image = suite.load("cartpole", "swingup").physics.render(height=16, width=16)
assert image.max() > 0, "the rendered frame is black"
"""


def select_renderer(backend: str | None = None) -> str:
    """Set the environment variables that dm_control and Mesa read, before dm_control is imported; children inherit them.

    Args:
        backend: OpenGL backend, one of `BACKENDS`; None keeps `MUJOCO_GL`, or takes egl if it is unset.
    Returns:
        the selected backend.
    """
    os.environ["MUJOCO_GL"] = backend or os.environ.get("MUJOCO_GL") or BACKENDS[0]
    # By default Mesa's software rasteriser starts threads, which compete with the collector's processes for the same cores.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    return os.environ["MUJOCO_GL"]


def probe_renderer(timeout: float = 60.0) -> str:
    """Find the first OpenGL backend that renders a frame. Each is tried in a child process with a time limit.

    The child protects the caller: a missing library fails with an obscure message, and several EGL processes on one GPU can hang
    in the first frame (google-deepmind/mujoco issue 3444). If `MUJOCO_GL` is set, only that backend is tried; otherwise egl, then
    osmesa.

    Args:
        timeout: seconds for each backend.
    Returns:
        the backend, which is also selected for this process and its children.
    Raises:
        DataError: no backend works; the message names each failure and the packages to install.
    """
    requested = os.environ.get("MUJOCO_GL")
    failures = []
    for backend in (requested,) if requested else BACKENDS:
        environment = {**os.environ, "MUJOCO_GL": backend, "LP_NUM_THREADS": os.environ.get("LP_NUM_THREADS", "0")}
        try:
            child = subprocess.run(
                [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            failures.append(f"{backend}: no frame within {timeout:g} s")
            continue
        if child.returncode == 0:
            if failures:
                print(f"rendering with {backend}, because {'; '.join(failures)}", file=sys.stderr)
            return select_renderer(backend)
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        failures.append(f"{backend}: {lines[-1]}")
    remedy = f"unset MUJOCO_GL (it is {requested!r}) or set it to egl or osmesa, and if that does not help, " if requested else ""
    raise DataError(f"no OpenGL backend renders a frame ({'; '.join(failures)}); {remedy}{INSTALL_HINT}")


class RenderedTask:
    """A dm_control task observed as pictures, one rendered after every `frame_skip` simulator steps.

    Actions are float [A], clipped to [-1, 1]. dm_control receives `applied(action)`: float64, the action itself wherever the bounds
    of the task are [-1, 1], so that recorded actions can be replayed without this class and give the same states bit by bit.
    Rewards of the skipped steps are summed, their discounts multiplied. A picture is uint8 [H, W, 3], a new array each time. An
    OpenGL context belongs to the thread that renders first: use an instance in one thread only.

    Args:
        config: task, frame skip, image size and render quality.
        seed: of the initial states.
    Attributes:
        action_dim, image_size: A; H = W. frame_skip: simulator steps for one agent step.
        diverged: whether the episode ended because the simulation diverged. Its frames are not to be trusted.
        position_names: of the n points that `positions` returns, see `moving_points`.
    Raises:
        DataError: there is no such domain, task or camera, or its actions have no bounds.
    """

    def __init__(self, config: DataConfig, seed: int):
        select_renderer()
        # Triton and Mesa's llvmpipe each bring an LLVM: Triton imported after the first OpenGL context crashes the process.
        with contextlib.suppress(ImportError):
            import triton._C.libtriton  # noqa: F401
        from dm_control import suite
        from dm_control.mujoco import engine

        check_task(config.domain, config.task)
        self._env = suite.load(config.domain, config.task, task_kwargs={"random": seed})
        self._env.task.get_observation = lambda physics: {}  # only the picture is used; joint angles would take a tenth of the time
        self.frame_skip, self.image_size = config.frame_skip, config.image_size
        spec = check_actions(config, self._env)
        self.action_dim = spec.shape[0]
        self._low, self._high = spec.minimum, spec.maximum  # float64 [A]

        physics, fast = self._env.physics, config.render_quality == "fast"
        buffer = physics.model.vis.global_
        if fast:
            physics.model.vis.quality.offsamples = 0
            buffer.offwidth = buffer.offheight = config.image_size
        buffer.offwidth, buffer.offheight = max(buffer.offwidth, config.image_size), max(buffer.offheight, config.image_size)
        self._flags = {"shadow": False, "reflection": False} if fast else {}
        camera = find_camera(physics.model, config)
        self._camera = engine.Camera(physics, config.image_size, config.image_size, camera_id=camera)
        self.position_names, self._geoms, self._offsets = moving_points(physics.model)
        self.diverged = False

    def positions(self) -> np.ndarray:
        """The points `position_names` in the current picture: float32 [n, 2], (column, row) in pixels.

        (0, 0) is the centre of the top left pixel. A point may be outside the picture, or hidden behind another object.
        """
        data = self._env.physics.data
        rotated = np.einsum("nij,nj->ni", data.geom_xmat[self._geoms].reshape(-1, 3, 3), self._offsets)
        points = data.geom_xpos[self._geoms] + rotated  # [n, 3], world coordinates
        column, row, depth = self._camera.matrix @ np.concatenate([points, np.ones((len(points), 1))], axis=1).T
        return np.stack([column / depth, row / depth], axis=1).astype(np.float32)

    def _picture(self) -> np.ndarray:
        return np.ascontiguousarray(self._camera.render(render_flag_overrides=self._flags))

    def seed(self, seed: int) -> None:
        """Reseed the random numbers of the initial states."""
        self._env.task._random = np.random.RandomState(seed % 2**32)

    def reset(self) -> np.ndarray:
        """Begin an episode; returns its first picture, uint8 [H, W, 3]."""
        self._env.reset()
        self.diverged = False
        return self._picture()

    def applied(self, action: np.ndarray) -> np.ndarray:
        """The control, float64 [A], that dm_control receives for an action in [-1, 1], float [A].

        With a = float64(action): a where the bounds are [-1, 1], else low + (a + 1) * (high - low) / 2, in this order of operations.
        The conversion comes first: in float32 the sum would round, and the recorded action would not be the applied one.
        """
        action = np.clip(np.asarray(action, dtype=np.float64), -1, 1)
        unit = (self._low == -1) & (self._high == 1)
        return np.where(unit, action, self._low + (action + 1) * (self._high - self._low) / 2)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, float, bool]:
        """Take one agent step; returns (picture after it, reward, discount, whether the episode is over).

        A simulation that diverges ends the episode, with reward 0 and discount 1, and sets `diverged`.
        """
        from dm_control.rl.control import PhysicsError

        action = self.applied(action)
        reward, discount = 0.0, 1.0
        for _ in range(self.frame_skip):
            try:
                timestep = self._env.step(action)
                self.diverged = timestep.reward is None or not math.isfinite(timestep.reward)
            except PhysicsError:
                self.diverged = True
            if self.diverged:
                return np.zeros((self.image_size, self.image_size, 3), dtype=np.uint8), 0.0, 1.0, True
            reward += timestep.reward
            discount *= timestep.discount
            if timestep.last():
                break
        return self._picture(), reward, discount, timestep.last()

    def close(self) -> None:
        """Free the simulator and its OpenGL context."""
        self._env.close()


def check_task(domain: str, task: str) -> None:
    """Raise DataError, listing the choices, unless dm_control's suite has this domain and task."""
    select_renderer()
    from dm_control import suite

    tasks: dict[str, list[str]] = {}
    for known_domain, known_task in suite.ALL_TASKS:
        tasks.setdefault(known_domain, []).append(known_task)
    if domain not in tasks:
        raise DataError(f"--domain {domain}: dm_control has no such domain; choose one of {', '.join(sorted(tasks))}")
    if task not in tasks[domain]:
        raise DataError(f"--task {task}: domain {domain} has no such task; choose one of {', '.join(tasks[domain])}")


def check_actions(config: DataConfig, env: Any) -> Any:
    """The action spec of a dm_control environment. Raises DataError where an action has no bounds or a single value."""
    spec = env.action_spec()
    where = f"--domain {config.domain} --task {config.task}"
    if max(np.abs(spec.minimum).max(), np.abs(spec.maximum).max()) > 1e6:  # lqr uses 1e10 for infinity
        raise DataError(f"{where}: its actions have no bounds; choose another task")
    if not (varies := spec.minimum < spec.maximum).all():
        raise DataError(f"{where}: an action can only be {spec.minimum[~varies][0]:g}, so there is nothing to choose; choose another task")
    return spec


def find_camera(model: Any, config: DataConfig) -> int:
    """The number of `config.camera` in a MuJoCo model. Raises DataError, listing the choices, if there is no such camera."""
    names = [model.id2name(number, "camera") for number in range(model.ncam)]
    if config.camera in names:
        return names.index(config.camera)
    numbers = ["-1", *map(str, range(len(names)))]
    if config.camera not in numbers and not (config.camera == "0" and not names):
        choices = ", ".join(["-1", *(f"{number} ({name})" if name else str(number) for number, name in enumerate(names))])
        raise DataError(f"--camera {config.camera}: {config.domain} {config.task} has no such camera; choose one of {choices}")
    return int(config.camera) if names else -1


class Task(NamedTuple):
    """What is known of a task before it is played."""

    action_low: tuple[float, ...]  # [A], of the simulator; an action of -1 stands for it
    action_high: tuple[float, ...]  # an action of 1
    longest: int  # agent steps of the longest episode, or `sys.maxsize`
    position_names: list[str]  # of the moving points

    @property
    def action_dim(self) -> int:
        return len(self.action_low)


def describe_task(config: DataConfig) -> Task:
    """The task of a config, without rendering. Raises DataError."""
    check_task(config.domain, config.task)
    from dm_control import suite

    env = suite.load(config.domain, config.task)
    find_camera(env.physics.model, config)
    steps = env._step_limit
    longest = math.ceil(steps / config.frame_skip) if math.isfinite(steps) else sys.maxsize
    spec = check_actions(config, env)
    return Task(tuple(spec.minimum.tolist()), tuple(spec.maximum.tolist()), longest, moving_points(env.physics.model)[0])


def moving_points(model: Any) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Points that follow the moving bodies of a MuJoCo model.

    They are the centre of every visible geom that is not welded to the world and, for a capsule, also the end farther from the joint
    of its body: a pole has `pole_1` and `pole_1/tip`.

    Returns:
        (names of the n points; geom of each, int64 [n]; offset in the frame of that geom, float64 [n, 3]).
    """
    import mujoco

    names, geoms, offsets = [], [], []
    for geom in range(model.ngeom):
        body = model.geom_bodyid[geom]
        hidden = model.geom_group[geom] > 2 or model.geom_rgba[geom, 3] == 0  # groups above 2 are not drawn by default
        if hidden or model.body_weldid[body] == 0:
            continue
        name = model.id2name(geom, "geom") or f"geom_{geom}"
        names, geoms, offsets = [*names, name], [*geoms, geom], [*offsets, np.zeros(3)]
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_CAPSULE:
            axis = np.zeros(9)
            mujoco.mju_quat2Mat(axis, model.geom_quat[geom])
            joint = model.jnt_pos[model.body_jntadr[body]] if model.body_jntnum[body] else np.zeros(3)
            direction = 1.0 if axis.reshape(3, 3)[:, 2] @ (model.geom_pos[geom] - joint) >= 0 else -1.0
            end = np.array([0.0, 0.0, direction * model.geom_size[geom, 1]])
            names, geoms, offsets = [*names, f"{name}/tip"], [*geoms, geom], [*offsets, end]
    return names, np.array(geoms, dtype=np.int64), np.array(offsets).reshape(-1, 3)


def episode_seeds(seed: int, number: int, attempt: int = 0) -> tuple[int, int]:
    """(of the initial state, of the policy) of episode `number` of a recording; another attempt follows one that diverged."""
    return tuple(np.random.SeedSequence([seed, number, attempt]).generate_state(2).tolist())


def make_environment(config: DataConfig, seed: int, numbers: Iterable[int]) -> EnvBase:
    """A dm_control task as a TorchRL environment that plays the episodes of these numbers; then others, numbered -1.

    How an episode begins is a function of the seed and its number alone, so it is the same whoever else plays. One that diverges is begun
    anew, with another initial state.

    Observations: `pixels` uint8 [H, W, 3], `positions` float32 [n, 2] (see `RenderedTask.positions`), `diverged` bool [1] and
    `is_init` bool [1], true only after a reset, so that a policy with memory can reset it; `number` of the episode and `policy_seed`, of
    the policy's random numbers in it, int64 [1] each. Actions: float32 [A] in [-1, 1]. Each step
    gives a reward float32 [1] and `discount` float32 [1]. An episode that ends with discount 1 (the time limit, or a simulation that
    diverged) is `truncated`, any other `terminated`.
    Raises DataError as `RenderedTask` does. The class is defined in this function so that `aime_fast` imports without TorchRL.
    """
    from tensordict import TensorDict
    from torchrl.data import Bounded, Categorical, Composite, Unbounded
    from torchrl.envs import EnvBase

    task, numbers = RenderedTask(config, 0), iter(numbers)
    size = config.image_size
    flag = lambda: Categorical(n=2, shape=(1,), dtype=torch.bool)  # noqa: E731

    class DMControlPixels(EnvBase):
        def __init__(self):
            super().__init__(device=None, batch_size=())
            self.observation_spec = Composite(
                pixels=Bounded(0, 255, shape=(size, size, 3), dtype=torch.uint8),
                positions=Unbounded(shape=(len(task.position_names), 2), dtype=torch.float32),
                is_init=flag(),
                discount=Unbounded(shape=(1,), dtype=torch.float32),
                diverged=flag(),
                number=Unbounded(shape=(1,), dtype=torch.int64),
                policy_seed=Unbounded(shape=(1,), dtype=torch.int64),
            )
            self.number = self.attempt = self.policy_seed = -1
            self.action_spec = Bounded(-1.0, 1.0, shape=(task.action_dim,), dtype=torch.float32)
            self.reward_spec = Unbounded(shape=(1,), dtype=torch.float32)
            self.done_spec = Composite(done=flag(), terminated=flag(), truncated=flag())

        def _out(self, pixels: np.ndarray, discount: float, is_init: bool, **values: Any) -> TensorDict:
            last = values.pop("last", False)
            return TensorDict(
                {
                    "pixels": torch.from_numpy(pixels),
                    "positions": torch.from_numpy(np.zeros_like(task.positions()) if task.diverged else task.positions()),
                    "diverged": torch.tensor([task.diverged]),
                    "is_init": torch.tensor([is_init]),
                    "number": torch.tensor([self.number]),
                    "policy_seed": torch.tensor([self.policy_seed]),
                    "discount": torch.tensor([discount], dtype=torch.float32),
                    "done": torch.tensor([last]),
                    "terminated": torch.tensor([last and discount < 1]),
                    "truncated": torch.tensor([last and discount == 1]),
                    **{key: torch.tensor([value], dtype=torch.float32) for key, value in values.items()},
                },
                batch_size=(),
            )

        def _reset(self, tensordict: Any = None, **kwargs: Any) -> TensorDict:
            if task.diverged:
                self.attempt += 1
            else:
                self.number, self.attempt = next(numbers, -1), 0
            state_seed, self.policy_seed = episode_seeds(seed, max(self.number, 0), self.attempt)
            task.seed(state_seed)
            return self._out(task.reset(), 1.0, True)

        def _step(self, tensordict: TensorDict) -> TensorDict:
            pixels, reward, discount, last = task.step(tensordict["action"].numpy())
            return self._out(pixels, discount, False, reward=reward, last=last)

        def _set_seed(self, seed: int | None) -> None:
            pass  # each episode has its own

        def close(self, **kwargs: Any) -> None:
            task.close()
            super().close(**kwargs)

    return DMControlPixels()
