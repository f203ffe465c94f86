"""dm_control as a source of frames: the renderer, one picture an agent step, and the TorchRL environment around it.

Rendering on a CPU is where collection spends its time, so `render_quality="fast"` gives up what a 64-pixel picture hardly
shows: anti-aliasing, shadows and reflections, and an offscreen buffer larger than the picture. `"full"` keeps dm_control's own
settings. The pictures differ, so the choice travels with the data set.

dm_control picks its OpenGL backend when it is imported; everything here that imports it calls `select_renderer` before.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

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
        backend: OpenGL backend, one of `BACKENDS`; None keeps `MUJOCO_GL`, or takes egl where it is unset.
    Returns:
        the backend in force.
    """
    os.environ["MUJOCO_GL"] = backend or os.environ.get("MUJOCO_GL") or BACKENDS[0]
    # Mesa's software rasteriser otherwise starts threads that compete with the collector's processes for the same cores.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    return os.environ["MUJOCO_GL"]


def probe_renderer(timeout: float = 60.0) -> str:
    """The first OpenGL backend that really renders a frame, tried in a child process with a time limit.

    A missing library fails with an unintelligible message, and several EGL processes on one GPU can hang for ever in the
    first frame (google-deepmind/mujoco issue 3444); neither may happen in the caller. `MUJOCO_GL`, where set, is the only
    candidate; otherwise egl, then osmesa.

    Args:
        timeout: seconds granted to each candidate.
    Returns:
        the backend, which is also selected for this process and its children.
    Raises:
        DataError: no candidate works; names each one's failure and the packages to install.
    """
    chosen = os.environ.get("MUJOCO_GL")
    failures = []
    for backend in (chosen,) if chosen else BACKENDS:
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
    remedy = f"unset MUJOCO_GL (it is {chosen!r}) or set it to egl or osmesa, and if that does not help, " if chosen else ""
    raise DataError(f"no OpenGL backend renders a frame ({'; '.join(failures)}); {remedy}{INSTALL_HINT}")


class RenderedTask:
    """A dm_control task that is seen as pictures, one rendered after every `frame_skip` simulator steps.

    Actions are float [A] in [-1, 1] and are rescaled to the bounds of the task. Rewards of the skipped steps are summed, their
    discounts multiplied. A picture is uint8 [H, W, 3], a fresh array each time. OpenGL contexts belong to the thread that
    renders first; use one instance in one thread.

    Attributes:
        action_dim: A.
        position_names: the n points that `positions` follows, see `moving_points`.

    Raises:
        DataError: there is no such domain or task, or its actions have no bounds.
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
        self._env.task.get_observation = lambda physics: {}  # the picture is the observation; joint angles would cost a tenth
        self.frame_skip, self.image_size = config.frame_skip, config.image_size
        spec = self._env.action_spec()
        if max(np.abs(spec.minimum).max(), np.abs(spec.maximum).max()) > 1e6:  # lqr says 1e10 for infinity
            raise DataError(f"--domain {config.domain} --task {config.task}: its actions have no bounds; choose another task")
        self.action_dim = spec.shape[0]
        self._low, self._scale = spec.minimum, (spec.maximum - spec.minimum) / 2

        physics, fast = self._env.physics, config.render_quality == "fast"
        buffer = physics.model.vis.global_
        if fast:
            physics.model.vis.quality.offsamples = 0
            buffer.offwidth = buffer.offheight = config.image_size
        buffer.offwidth, buffer.offheight = max(buffer.offwidth, config.image_size), max(buffer.offheight, config.image_size)
        self._flags = {"shadow": False, "reflection": False} if fast else {}
        camera_id = 0 if physics.model.ncam else -1
        self._camera = engine.Camera(physics, config.image_size, config.image_size, camera_id=camera_id)
        self.position_names, self._geoms, self._offsets = moving_points(physics.model)

    def positions(self) -> np.ndarray:
        """Where the points `position_names` lie in the picture of this moment: float32 [n, 2], (column, row) in pixels.

        (0, 0) is the centre of the top left pixel. A point may lie outside the picture, or behind something.
        """
        data = self._env.physics.data
        turned = np.einsum("nij,nj->ni", data.geom_xmat[self._geoms].reshape(-1, 3, 3), self._offsets)
        points = data.geom_xpos[self._geoms] + turned  # [n, 3], world
        column, row, depth = self._camera.matrix @ np.concatenate([points, np.ones((len(points), 1))], axis=1).T
        return np.stack([column / depth, row / depth], axis=1).astype(np.float32)

    def _picture(self) -> np.ndarray:
        return np.ascontiguousarray(self._camera.render(render_flag_overrides=self._flags))

    def seed(self, seed: int) -> None:
        """Restart the random numbers from which initial states are drawn."""
        self._env.task._random = np.random.RandomState(seed % 2**32)

    def reset(self) -> np.ndarray:
        """Begin an episode; returns its first picture."""
        self._env.reset()
        return self._picture()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, float, bool]:
        """Take one agent step; returns the picture after it, the reward, the discount and whether the episode is over."""
        action = self._low + (np.clip(action, -1, 1) + 1) * self._scale
        reward, discount = 0.0, 1.0
        for _ in range(self.frame_skip):
            moment = self._env.step(action)
            reward += moment.reward
            discount *= moment.discount
            if moment.last():
                break
        return self._picture(), reward, discount, moment.last()

    def close(self) -> None:
        """Free the simulator and its OpenGL context."""
        self._env.close()


def check_task(domain: str, task: str) -> None:
    """Raises DataError, listing what there is, unless dm_control's suite has this domain and task."""
    select_renderer()
    from dm_control import suite

    tasks: dict[str, list[str]] = {}
    for known_domain, known_task in suite.ALL_TASKS:
        tasks.setdefault(known_domain, []).append(known_task)
    if domain not in tasks:
        raise DataError(f"--domain {domain}: dm_control has no such domain; choose one of {', '.join(sorted(tasks))}")
    if task not in tasks[domain]:
        raise DataError(f"--task {task}: domain {domain} has no such task; choose one of {', '.join(tasks[domain])}")


def describe_task(config: DataConfig) -> tuple[int, int, list[str]]:
    """Action dimension, agent steps of the longest episode and names of the moving points of a task, found without rendering."""
    check_task(config.domain, config.task)
    from dm_control import suite

    env = suite.load(config.domain, config.task)
    steps = env._step_limit
    longest = math.ceil(steps / config.frame_skip) if math.isfinite(steps) else sys.maxsize
    return env.action_spec().shape[0], longest, moving_points(env.physics.model)[0]


def moving_points(model: Any) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The points of a MuJoCo model that say where its moving bodies are.

    They are the centre of every visible geom that is not welded to the world, and of every capsule the end farther from the joint of its
    body: a pole's `pole_1` and `pole_1/tip`.

    Returns:
        n names; the geom of each, int64 [n]; its place in that geom's frame, float64 [n, 3].
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
            away = 1.0 if axis.reshape(3, 3)[:, 2] @ (model.geom_pos[geom] - joint) >= 0 else -1.0
            end = np.array([0.0, 0.0, away * model.geom_size[geom, 1]])
            names, geoms, offsets = [*names, f"{name}/tip"], [*geoms, geom], [*offsets, end]
    return names, np.array(geoms, dtype=np.int64), np.array(offsets).reshape(-1, 3)


def make_environment(config: DataConfig, seed: int) -> EnvBase:
    """A dm_control task as a TorchRL environment.

    Observations: `pixels` uint8 [H, W, 3], `positions` float32 [n, 2] (see `RenderedTask.positions`) and `is_init` bool [1], true after
    a reset only, which tells a policy with a memory when to forget. Actions: float32 [A] in [-1, 1]. Beside the reward float32 [1],
    each step gives `discount` float32 [1].
    The end by time limit is `truncated` (discount 1), any other end `terminated`.

    The class is made inside this function because `aime_fast` imports without TorchRL.
    """
    from tensordict import TensorDict
    from torchrl.data import Bounded, Categorical, Composite, Unbounded
    from torchrl.envs import EnvBase

    task = RenderedTask(config, seed)
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
            )
            self.action_spec = Bounded(-1.0, 1.0, shape=(task.action_dim,), dtype=torch.float32)
            self.reward_spec = Unbounded(shape=(1,), dtype=torch.float32)
            self.done_spec = Composite(done=flag(), terminated=flag(), truncated=flag())

        def _out(self, pixels: np.ndarray, discount: float, is_init: bool, **values: Any) -> TensorDict:
            last = values.pop("last", False)
            return TensorDict(
                {
                    "pixels": torch.from_numpy(pixels),
                    "positions": torch.from_numpy(task.positions()),
                    "is_init": torch.tensor([is_init]),
                    "discount": torch.tensor([discount], dtype=torch.float32),
                    "done": torch.tensor([last]),
                    "terminated": torch.tensor([last and discount < 1]),
                    "truncated": torch.tensor([last and discount == 1]),
                    **{key: torch.tensor([value], dtype=torch.float32) for key, value in values.items()},
                },
                batch_size=(),
            )

        def _reset(self, tensordict: Any = None, **kwargs: Any) -> TensorDict:
            return self._out(task.reset(), 1.0, True)

        def _step(self, tensordict: TensorDict) -> TensorDict:
            pixels, reward, discount, last = task.step(tensordict["action"].numpy())
            return self._out(pixels, discount, False, reward=reward, last=last)

        def _set_seed(self, seed: int | None) -> None:
            if seed is not None:
                task.seed(seed)

        def close(self, **kwargs: Any) -> None:
            task.close()
            super().close(**kwargs)

    return DMControlPixels()
