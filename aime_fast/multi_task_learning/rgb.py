"""RGB over the parameters of a model: task losses in, balanced gradients in `.grad` out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from aime_fast.config import OptimConfig
from kernels.rgb import AGGREGATIONS, MIN_NORM, TaskGradients, rgb_rotate_


class RGB(nn.Module):
    """Rotation-based gradient balancing over shared parameters, with the public names of AIME and LibMTL.

    Attributes:
        get_share_params: set by the user; a callable that returns the shared parameters, always in the same order.
        task_num: number of tasks, None until it is known.
        device: device of the state, None until it is known.
        rep_grad: False; gradients of a shared representation instead of parameters are not supported.
        direction: consensus direction d, flat [P] (buffer). P is known at the first call, or from the loaded state.
        angles: [n] (buffer).
        has_direction: bool scalar (buffer), False until the first call.

    A step whose result is not finite changes neither direction nor angles; whether the gradients are used is the caller's choice,
    for which `backward` returns `result_norm`.

    Args:
        mu: weight of the old direction.
        lam: pull towards the original gradients.
        alpha_steps, lr_inner: number and size of the gradient steps on the angles.
        aggregation: "norm_weighted", sum |g_i| r_i; or "mean", mean r_i.

    Example:
        >>> rgb = RGB()
        >>> rgb.get_share_params = model.parameters
        >>> optimizer.zero_grad(); info = rgb.backward(task_losses); optimizer.step()
    """

    direction: Tensor
    angles: Tensor
    has_direction: Tensor

    def __init__(
        self,
        mu: float = OptimConfig.rgb_mu,
        lam: float = OptimConfig.rgb_lambda,
        alpha_steps: int = OptimConfig.rgb_alpha_steps,
        lr_inner: float = OptimConfig.rgb_lr_inner,
        aggregation: str = OptimConfig.aggregation,
    ):
        super().__init__()
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"RGB: aggregation {aggregation!r} is unknown; choose 'norm_weighted' or 'mean'")
        self.mu, self.lam, self.alpha_steps, self.lr_inner, self.aggregation = mu, lam, alpha_steps, lr_inner, aggregation
        self.task_num: int | None = None
        self.device: torch.device | None = None
        self.rep_grad = False
        self.get_share_params: Callable[[], Iterable[Tensor]] | None = None
        self.register_buffer("direction", torch.zeros(0))
        self.register_buffer("angles", torch.zeros(0))
        self.register_buffer("has_direction", torch.tensor(False))

    def reset(self, num_tasks: int, num_parameters: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        """Allocate an empty state: no direction, angles 0. The first `rotate` does it by itself; call it before compiling."""
        self.task_num, self.device = num_tasks, torch.device(device)
        self.direction = torch.zeros(num_parameters, dtype=dtype, device=device)
        self.angles = torch.zeros(num_tasks, dtype=dtype, device=device)
        self.has_direction = torch.zeros((), dtype=torch.bool, device=device)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The sizes of the state are part of it: a fresh RGB takes those of the checkpoint, on its own device.
        for name in ("direction", "angles"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and (saved.shape, saved.dtype) != (own.shape, own.dtype):
                setattr(self, name, torch.zeros_like(saved, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.task_num = self.angles.numel() or None

    def _prepare(self, task_gradients: TaskGradients) -> None:
        """Allocate the state for these gradients, on their device; a no-op from the second call on."""
        rows = [[row] for row in task_gradients] if isinstance(task_gradients, Tensor) else task_gradients
        reached = [next((g for g in column if g is not None), None) for column in zip(*rows)]
        known = [g for g in reached if g is not None]
        if not known:
            raise ValueError("RGB: no task has a gradient; are the losses computed from the shared parameters?")
        tasks, numbers = len(rows), sum(g.numel() for g in known)
        if self.direction.numel() == 0:
            dtype = torch.float64 if known[0].dtype == torch.float64 else torch.float32
            self.reset(tasks, numbers, known[0].device, dtype)
        if self.angles.numel() != tasks:
            raise ValueError(f"RGB: {tasks} tasks, but the state is that of {self.angles.numel()}; call reset() to start again")
        if self.direction.device != known[0].device:
            self.to(known[0].device)
        self.device = self.direction.device

    @torch.no_grad()
    def rotate(
        self, task_gradients: TaskGradients, max_norm: float | None = None, out: Tensor | None = None
    ) -> tuple[Tensor | list[Tensor], dict[str, Tensor]]:
        """Balance gradients that the caller computed, and advance the state. No host synchronisation.

        Args:
            task_gradients: [n, P], the fast way; or for each task one tensor for each shared parameter, None where it does not
                reach it. At least one task reaches each parameter.
            max_norm: clip the result to this length, for free.
            out: where to write the result, flat [P]; `.grad` may be views of it.

        Returns:
            The balanced gradient, flat [P] or that of each parameter, in its shape and dtype, and device tensors:
            `gradient_norms [n]`, `cosine [n, n]` (0 for a task without gradient), `angles [n]`, `result_norm` scalar, before clipping.

        Raises:
            ValueError: number of tasks or of parameters differs from the state's, or a parameter that no task reaches.
        """
        self._prepare(task_gradients)
        result, gram, result_norm = rgb_rotate_(
            task_gradients, self.direction, self.angles, self.has_direction, mu=self.mu, lam=self.lam, alpha_steps=self.alpha_steps,
            lr_inner=self.lr_inner, aggregation=self.aggregation, max_norm=max_norm, out=out,
        )  # fmt: skip
        norms = gram.diagonal()[:-1].sqrt()
        scale = torch.where(norms > MIN_NORM, 1 / norms, 0.0)
        dtype = self.angles.dtype
        info = {
            "gradient_norms": norms.to(dtype),
            "cosine": (gram[:-1, :-1] * scale.unsqueeze(0) * scale.unsqueeze(1)).to(dtype),
            "angles": self.angles.clone(),
            "result_norm": result_norm.to(dtype),
        }
        return result, info

    def task_gradients(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """Gradient of each loss with respect to each parameter.

        Args: losses, n scalars; parameters, P tensors of any shape.

        Returns: n lists of P tensors in the parameters' shapes and dtypes; None where a loss does not depend on a parameter.
        """
        gradients = []
        for i, loss in enumerate(losses):
            if loss.requires_grad:
                last = not any(later.requires_grad for later in losses[i + 1 :])
                gradients.append(list(torch.autograd.grad(loss, parameters, retain_graph=not last, allow_unused=True)))
            else:
                gradients.append([None] * len(parameters))
        return gradients

    def backward(self, losses: Sequence[Tensor]) -> dict[str, Tensor]:
        """Add the balanced gradient of the task losses to `.grad` of every shared parameter.

        Args:
            losses: scalar tensors, one for each task, always in the same order.

        Returns:
            Device tensors as described in `rotate`.

        Raises:
            RuntimeError: `get_share_params` is not set.
            NotImplementedError: `rep_grad` is True.
        """
        if self.rep_grad:
            raise NotImplementedError("RGB: rep_grad=True (gradients of a representation) is not supported; set rgb.rep_grad = False")
        if self.get_share_params is None:
            raise RuntimeError("RGB: get_share_params is not set; assign it first: rgb.get_share_params = model.get_share_params")
        parameters = [p for p in self.get_share_params() if p.requires_grad]
        gradients = self.task_gradients(losses, parameters)
        for i, parameter in enumerate(parameters):
            if all(task[i] is None for task in gradients):
                gradients[0][i] = torch.zeros_like(parameter)
        result, info = self.rotate(gradients)
        for parameter, gradient in zip(parameters, result):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
        return info
