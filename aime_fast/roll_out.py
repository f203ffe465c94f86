"""A loop over frames, each of which hangs on the one before: plain, compiled, or captured as one CUDA graph that every frame replays.

The state has a fixed shape, so one compiled frame serves a roll-out of any length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

MODES = ("off", "on", "graph")
WARM_UP = 3  # frames before a capture: they compile, choose algorithms and allocate, none of which may happen inside


def alike(new: Any, old: Any) -> Any:
    """Nested tensors `new` with dtypes and strides of `old`: compiled code, which looks at both, sees the same state at every frame."""
    return pytree.tree_map(lambda value, like: torch.empty_like(like).copy_(value), new, old)


class RollOut:
    """Calls `frame(module, action, state, *options) -> (outputs, state)` for one action after another.

    Args:
        frame: a function of nested tensors of fixed shapes that reads all weights through `module` and returns a state `alike` its own.
        mode: "off"; "on": `torch.compile`, once for each batch size and options; "graph": compiled, then captured as a CUDA graph.

    A copy or a pickle holds nothing compiled, and compiles for itself.

    Raises:
        ValueError: another mode, or "graph" with tensors that are not on a CUDA device.

    Example:
        >>> outputs, state = RollOut(imagine, "on")(model, actions, state, False)
    """

    def __init__(self, frame: Callable, mode: str = "off"):
        if mode not in MODES:
            raise ValueError(f"roll-out mode is {mode!r}, expected one of {', '.join(MODES)}")
        self.frame, self.mode = frame, mode
        self._advance = frame if mode == "off" else torch.compile(frame, fullgraph=True, dynamic=False)
        self._captured: dict[Any, _CapturedFrame] = {}

    def __reduce__(self) -> tuple:
        return RollOut, (self.frame, self.mode)

    def __call__(self, module: nn.Module, actions: Tensor, state: Any, *options: Any) -> tuple[Any, Any]:
        """Runs F frames.

        Args: actions [B, F, A]; state before the first frame, tensors [B, ...]; options of the frame, hashable.

        Returns: (outputs of all frames, stacked on axis 1: [B, F, ...]; the last state). With "graph" no gradient passes.
        """
        if actions.shape[1] == 0:
            raise ValueError("roll-out: there are no actions, expected one for each frame")
        if self.mode == "graph":
            frames, state = self._captured_frame(module, actions, state, options).run(actions, state)
        else:
            frames = []
            for action in actions.transpose(0, 1).contiguous():  # strides that do not depend on F
                outputs, state = self._advance(module, action, state, *options)
                frames.append(outputs)
        return pytree.tree_map(lambda *tensors: torch.stack(tensors, dim=1), *frames), state

    def _captured_frame(self, module: nn.Module, actions: Tensor, state: Any, options: tuple) -> _CapturedFrame:
        """The graph for these shapes and for weights where they now lie; made at the first call."""
        if not actions.is_cuda:
            raise ValueError(f"roll-out mode 'graph' needs a CUDA device, the actions are on {actions.device}; use 'on'")
        inputs = pytree.tree_leaves((actions[:, 0], state))
        weights = tuple(tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()))
        amp = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = weights, tuple((tensor.shape, tensor.dtype) for tensor in inputs), options, module.training, amp
        if key not in self._captured:
            self._captured[key] = _CapturedFrame(lambda a, s: self._advance(module, a, s, *options), actions[:, 0], state)
        return self._captured[key]


class _CapturedFrame:
    """One frame as a CUDA graph that reads its action and its state from buffers and leaves the next state there."""

    @torch.no_grad()
    def __init__(self, advance: Callable, action: Tensor, state: Any):
        self._action, self._state = action.clone(), pytree.tree_map(torch.clone, state)

        def frame() -> Any:
            outputs, following = advance(self._action, self._state)
            self._load(following)
            return outputs

        stream = torch.cuda.Stream(action.device)
        stream.wait_stream(torch.cuda.current_stream(action.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                frame()
        torch.cuda.current_stream(action.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):  # a loader's thread may go on copying
            self._outputs = frame()

    def _load(self, state: Any) -> None:
        """Copies a state to where the graph reads it."""
        for buffer, value in zip(pytree.tree_leaves(self._state), pytree.tree_leaves(state)):
            buffer.copy_(value)

    @torch.no_grad()
    def run(self, actions: Tensor, state: Any) -> tuple[list[Any], Any]:
        """Frames of actions [B, F, A] from `state`: (outputs of each, the last state)."""
        self._load(state)
        frames = []
        for action in actions.unbind(1):
            self._action.copy_(action)
            self._graph.replay()
            frames.append(pytree.tree_map(torch.clone, self._outputs))
        return frames, pytree.tree_map(torch.clone, self._state)
