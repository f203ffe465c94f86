"""One update of AIME, from a batch of frames to new weights, with nothing read back to the host.

    pixels -> augment -> forward_sequence -> LossAggregator -> four task gradients -> RGB -> clip -> Adam -> EMA
                                        └-> discriminator loss -> Adam      (every n_critic updates)

Schedules come in as tensors and metrics go out as tensors on the device, so that the whole can be compiled and captured as one
graph. An update whose losses or gradients are not finite changes nothing: the optimizers skip it by their `found_inf` flag,
buffers that the forward pass learns (codebooks) are put back, and RGB guards its own state. The caller reads
`metrics["finite"]` and asks `diagnose` what went wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.profiler import record_function

from aime_fast.config import Config, to_dict
from aime_fast.data import augment, normalise
from aime_fast.multi_task_learning import RGB, LossAggregator
from aime_fast.multi_task_learning.loss_aggregator import TASKS
from aime_fast.training.ema import EMA

BATCH_KEYS = ("pixels", "action", "is_init")
MONITORS = ("perplexity", "code_usage", "token_accuracy")  # outputs that are logged and not optimised

# Outputs in the order in which the model computes them, so that the first bad one is where a fault began.
COMPUTED = (
    "tokens", "context", "posterior_mean", "posterior_logvar", "latents", "hidden", "mixture_weights", "component_means",
    "component_logvars", "slot_maps", "attention", "attention_prior", "movement", "reconstructions",
)  # fmt: skip


class NonFiniteError(FloatingPointError):
    """A tensor holds nan or infinity. The message names it, the step, how many elements, and where the first one is."""


def check_tensor(name: str, tensor: Tensor, step: int | None = None) -> Tensor:
    """Return `tensor` if every element is finite. Waits for the device: meant for finding a fault, not for the loop.

    Raises:
        NonFiniteError: "latents at step 12: 3 of 960 elements are not finite (2 nan, 1 inf), the first at index (0, 4, 2)".
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    bad = ~torch.isfinite(tensor.detach())
    if count := int(bad.sum()):
        nans = int(torch.isnan(tensor.detach()).sum())
        first = tuple(bad.nonzero()[0].tolist())
        at = "" if step is None else f" at step {step}"
        where = f", the first at index {first} of shape {list(tensor.shape)}" if tensor.dim() else ""
        raise NonFiniteError(
            f"{name}{at}: {count} of {tensor.numel()} elements are not finite ({nans} nan, {count - nans} infinite){where}"
        )
    return tensor


class GradientRows:
    """Gradients of several losses over the same parameters: `flat` [rows, P], one row a loss.

    `views[row][i]` is the part of parameter i in that parameter's own memory layout: the fused optimizers read gradients as raw
    memory and would mix up the elements of a channels-last weight otherwise.
    """

    def __init__(self, parameters: list[nn.Parameter], rows: int):
        self.parameters = parameters
        self.flat = torch.zeros(rows, sum(p.numel() for p in parameters), device=parameters[0].device)
        self.views = [self._split(row) for row in self.flat]

    def _split(self, row: Tensor) -> list[Tensor]:
        parts = row.split([p.numel() for p in self.parameters])
        return [part.as_strided(p.shape, p.stride(), part.storage_offset()) for part, p in zip(parts, self.parameters)]

    def add(self, row: int, loss: Tensor, scale: float, retain_graph: bool) -> None:
        """flat[row] += scale * dloss/dparameters; parameters that the loss does not reach get nothing."""
        if not loss.requires_grad:
            return
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=retain_graph, allow_unused=True)
        reached = [(view, g) for view, g in zip(self.views[row], gradients) if g is not None]
        torch._foreach_add_([view for view, _ in reached], [g for _, g in reached], alpha=scale)

    def attach(self, row: int = 0) -> None:
        """Make `flat[row]` the `.grad` of the parameters."""
        for parameter, view in zip(self.parameters, self.views[row]):
            parameter.grad = view


class TrainingStep:
    """Model, EMA copy, optimizers and RGB joined into one update.

    Args:
        model: `DPGMMVariationalRecurrentAutoencoder` on its device.
        config: the run's settings.
    """

    def __init__(self, model: nn.Module, config: Config):
        self.model, self.config = model, config
        self.ema = EMA(model, config.optim.ema_decay)
        self.device = next(model.parameters()).device
        optim = config.optim

        shared = list(model.get_share_params())
        perceiver = {id(p) for p in model.perceiver_io.parameters()}
        self.optimizer = self._adam(
            optim.adam_beta1,
            (optim.learning_rate, [p for p in shared if id(p) not in perceiver]),
            (optim.learning_rate * optim.perceiver_lr_scale, [p for p in shared if id(p) in perceiver]),
        )
        self.discriminator_optimizer = self._adam(0.9, (optim.discriminator_lr, list(model.discriminator_parameters())))
        self.tasks = GradientRows(shared, len(TASKS))
        self.total = GradientRows(shared, 1)
        self.discriminator = GradientRows(list(model.discriminator_parameters()), 1)

        self.losses = LossAggregator(**to_dict(config.loss))
        self.rgb = RGB(
            mu=optim.rgb_mu, lam=optim.rgb_lambda, alpha_steps=optim.rgb_alpha_steps, lr_inner=optim.rgb_lr_inner,
            aggregation=optim.aggregation,
        )  # fmt: skip
        self.rgb.reset(len(TASKS), self.tasks.flat.shape[1], self.device)
        self._seen: list[tuple[TensorDict, TensorDict, dict[str, Tensor]]] = []

    def _adam(self, beta1: float, *groups: tuple[float, list[nn.Parameter]]) -> torch.optim.Adam:
        # Learning rates are tensors, filled by the schedule at each step: a captured graph reads the new value.
        return torch.optim.Adam(
            [{"params": parameters, "lr": torch.tensor(lr, device=self.device)} for lr, parameters in groups],
            betas=(beta1, 0.999),
            fused=True,
        )

    def __call__(
        self,
        batches: Sequence[TensorDict],
        beta: Tensor,
        learning_rate: Tensor,
        train_discriminator: bool,
        adversarial: Tensor | float = 1.0,
    ) -> TensorDict:
        """One update from `optim.accumulate` batches.

        Args:
            batches: on the device, with `pixels` uint8 [B, T, 3, H, W], `action` float32 [B, T, A], `is_init` bool [B, T, 1].
            beta: weight of the KL terms, a scalar tensor.
            learning_rate: of the generator, a scalar tensor.
            train_discriminator: whether the discriminators learn too.
            adversarial: 0 or 1, whether the generator plays against them.

        Returns:
            TensorDict of scalar tensors on the device: `loss/*`, `model/*`, `gradient_norm/*`, `rgb/*`, the schedules, and
            `finite` (bool): whether the update was made.
        """
        guarded = [*self.model.buffers(), *self.rgb.buffers()]
        before = [buffer.clone() for buffer in guarded]
        self.tasks.flat.zero_()
        self.discriminator.flat.zero_()
        self._seen.clear()
        metrics: dict[str, Tensor] = {}
        for batch in batches:
            for name, value in self._gradients(batch, beta, adversarial, 1.0 / len(batches), train_discriminator).items():
                metrics[name] = metrics[name] + value if name in metrics else value

        # RGB sees all parameters as one flat vector for each task, and writes the clipped result where `.grad` looks.
        with record_function("step: RGB"):
            _, rotation = self.rgb.rotate(self.tasks.flat, max_norm=self.config.optim.grad_clip, out=self.total.flat[0])
        metrics |= {f"gradient_norm/{task}": norm for task, norm in zip(TASKS, rotation["gradient_norms"].unbind())}
        if train_discriminator:
            metrics["gradient_norm/discriminator"] = torch.linalg.vector_norm(self.discriminator.flat)
        finite = torch.isfinite(torch.stack([v.float() for name, v in metrics.items() if not name.startswith("model/")])).all()
        metrics |= {f"rgb/angle_{task}": angle for task, angle in zip(TASKS, rotation["angles"].unbind())}
        metrics["gradient_norm/total"] = rotation["result_norm"]
        with record_function("step: clip and Adam"):
            for group, scale in zip(self.optimizer.param_groups, (1.0, self.config.optim.perceiver_lr_scale)):
                group["lr"].copy_(learning_rate * scale)
            self._update(self.optimizer, self.total, finite)
            if train_discriminator:
                gradient = self.discriminator.flat[0]
                gradient.mul_((self.config.optim.grad_clip / (metrics["gradient_norm/discriminator"] + 1e-6)).clamp(max=1.0))
                self._update(self.discriminator_optimizer, self.discriminator, finite)
        for buffer, old in zip(guarded, before):
            buffer.copy_(torch.where(finite, buffer, old))
        with record_function("step: EMA"):
            self.ema.update(finite)
        return TensorDict({**metrics, "beta": beta, "learning_rate": learning_rate, "finite": finite}, batch_size=[])

    def _gradients(
        self, batch: TensorDict, beta: Tensor, adversarial: Tensor | float, scale: float, train_discriminator: bool
    ) -> dict[str, Tensor]:
        """Forward one batch and add its gradients, times `scale`, to the rows. Returns its metrics, times `scale`."""
        present = set(batch.keys())
        if missing := [key for key in BATCH_KEYS if key not in present]:
            raise KeyError(f"a batch lacks {', '.join(missing)}; it has {', '.join(sorted(present))}")
        data, pixels = self.config.data, batch["pixels"]
        with record_function("step: augment"):
            observations = augment(pixels, data.max_shift, data.max_zoom) if data.augment else normalise(pixels)  # [B, T, 3, H, W]
        with record_function("step: forward"), self.autocast():
            outputs = self.model.forward_sequence(observations, batch["action"], batch["is_init"], ema=self.ema.model)
        losses, task_losses = self.losses.compute_losses(outputs, beta, adversarial)
        for row, (task, loss) in enumerate(zip(TASKS, task_losses)):
            with record_function(f"step: backward {task}"):
                self.tasks.add(row, loss, scale, retain_graph=row < len(task_losses) - 1)

        outputs = outputs.detach()
        metrics = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        metrics |= {f"model/{name}": outputs[name] for name in MONITORS}
        if train_discriminator:
            with record_function("step: discriminator"):
                with self.autocast():
                    loss, parts = self.model.discriminator_loss(outputs, observations, self.config.optim.gradient_penalty)
                self.discriminator.add(0, loss, scale, retain_graph=False)
            metrics |= {f"loss/{name}": part.detach() for name, part in (parts | {"discriminator": loss}).items()}
        self._seen.append((batch, outputs, metrics))
        return {name: value * scale for name, value in metrics.items()}

    def _update(self, optimizer: torch.optim.Adam, gradient: GradientRows, finite: Tensor) -> None:
        """One step along `gradient`, unless not `finite`."""
        gradient.attach()
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # read by the fused kernel, on the device
        optimizer.step()

    def autocast(self) -> torch.autocast:
        """The mixed precision of `--precision`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    def diagnose(self, step: int) -> NonFiniteError:
        """The first bad term of the update just made, in the order of computation. Call it where `finite` came out false."""
        bad_parameter = _first_error(((f"parameter {n}", p) for n, p in self.model.named_parameters()), step)
        error = _first_error(self._terms(), step)
        if error is None:
            error = NonFiniteError(f"gradient norm at step {step}: overflows although every element is finite")
        return error if bad_parameter is None else NonFiniteError(f"{error}. Its source may be {bad_parameter}")

    def _terms(self) -> Iterator[tuple[str, Tensor]]:
        for batch, outputs, metrics in self._seen:
            yield from ((f"batch {key!r}", batch[key]) for key in BATCH_KEYS)
            yield from ((f"output {key!r}", outputs[key]) for key in COMPUTED)
            yield from ((name, value) for name, value in metrics.items() if name.startswith("loss/"))
        names = {id(p): name for name, p in self.model.named_parameters()}
        for row, task in enumerate(TASKS):
            for parameter, view in zip(self.tasks.parameters, self.tasks.views[row]):
                yield f"gradient of task {task!r} for {names[id(parameter)]}", view
        for parameter, view in zip(self.discriminator.parameters, self.discriminator.views[0]):
            yield f"gradient of the discriminator loss for {names[id(parameter)]}", view

    def state_dict(self) -> dict[str, Any]:
        """Weights, EMA, both optimizers and RGB."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "rgb": self.rgb.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; tensors may lie on any device."""
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.ema.updates.copy_(state["ema_updates"])
        self.rgb.load_state_dict(state["rgb"])
        for optimizer, key in ((self.optimizer, "optimizer"), (self.discriminator_optimizer, "discriminator_optimizer")):
            optimizer.load_state_dict(state[key])
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].to(self.device)


def _first_error(terms: Iterator[tuple[str, Tensor]], step: int) -> NonFiniteError | None:
    for name, tensor in terms:
        try:
            check_tensor(name, tensor, step)
        except NonFiniteError as error:
            return error
    return None
