"""A loop over frames, each of which depends on the one before: eager, compiled, or captured as one CUDA graph that each frame replays.

The state has a fixed shape, so one compiled frame serves a roll-out of any length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aime_fast.config import Compile
from aime_fast.runtime.cuda_graph import Captured, Graphs
from aime_fast.runtime.machine import WAYS


def match_layout(new: Any, like: Any) -> Any:
    """Copies nested tensors `new` into the dtypes and strides of `like`, of the same structure.

    Compiled code is specialised on both: without this it would recompile at the second frame of a roll-out.
    """
    return pytree.tree_map(lambda value, old: torch.empty_like(old).copy_(value), new, like)


def _clone(replayed: Any) -> Any:
    """A copy of nested tensors that the next replay of a graph overwrites."""
    return pytree.tree_map(torch.clone, replayed)


class RollOut:
    """Calls `frame(module, action, state, *options) -> (outputs, state)` for one action after another.

    Args:
        frame: a function of nested tensors of fixed shapes that reads all weights through `module`; the state that it returns has the
            layout of the one that it is given (`match_layout`).
        mode: a key of `WAYS`. Where a frame is compiled it is so whole, once for each batch size and options; "graph" and "whole" are one.

    A copy or a pickle contains nothing compiled, and compiles by itself. One that captures stays on the device of its first call.

    Raises:
        ValueError: another mode, or one that captures with tensors that are not on a CUDA device.

    Example:
        >>> outputs, state = RollOut(imagine, "on")(model, actions, state, False)
    """

    def __init__(self, frame: Callable, mode: Compile = "off"):
        if mode not in WAYS:
            raise ValueError(f"roll-out mode is {mode!r}, expected one of {', '.join(WAYS)}")
        self.frame, self.mode, self._captures = frame, mode, WAYS[mode].captured
        compiles = WAYS[mode].regions or WAYS[mode].whole
        self._advance = torch.compile(frame, fullgraph=True, dynamic=False) if compiles else frame
        if compiles:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # each batch size and option is one
        self._graphs: Graphs | None = None

    def __reduce__(self) -> tuple:
        return RollOut, (self.frame, self.mode)

    def __call__(self, module: nn.Module, actions: Any, state: Any, *options: Any) -> tuple[Any, Any]:
        """Runs F frames.

        Args: actions [B, F, A], or nested tensors [B, F, ...]; state before the first frame, [B, ...]; options of the frame, hashable.

        Returns: (outputs of all frames, stacked on axis 1: [B, F, ...]; the last state). No gradient passes where frames are captured.
        """
        count = pytree.tree_leaves(actions)[0].shape[1]
        if count == 0:
            raise ValueError("roll-out: there are no actions, expected one for each frame")
        by_frame = pytree.tree_map(lambda x: x.transpose(0, 1).contiguous(), actions)  # strides that do not depend on F
        captured = self._graph_for(module, by_frame, state, options) if self._captures else None
        frames = []
        for action in (pytree.tree_map(lambda x, i=i: x[i], by_frame) for i in range(count)):
            outputs, state = captured(action, state) if captured else self._advance(module, action, state, *options)
            frames.append(_clone(outputs) if captured else outputs)
        return pytree.tree_map(lambda *tensors: torch.stack(tensors, dim=1), *frames), _clone(state) if captured else state

    def _graph_for(self, module: nn.Module, by_frame: Any, state: Any, options: tuple) -> Captured:
        """The graph for these shapes and for the present addresses of the weights; captured at the first calls."""
        device = pytree.tree_leaves(by_frame)[0].device
        if device.type != "cuda":
            raise ValueError(f"roll-out mode {self.mode!r} needs a CUDA device, the actions are on {device}; use 'on'")
        inputs = pytree.tree_leaves((pytree.tree_map(lambda x: x[0], by_frame), state))
        weights = tuple(tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()))
        amp = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = weights, tuple((tensor.shape, tensor.dtype) for tensor in inputs), options, module.training, amp
        self._graphs = self._graphs or Graphs(device)
        return self._graphs.of(key, torch.no_grad()(lambda action, before: self._advance(module, action, before, *options)))
