"""One update of AIME, from a batch of frames to new weights, with nothing read back to the host.

    pixels -> augment -> forward_sequence -> LossAggregator -> four task gradients -> RGB -> clip -> Adam -> EMA
                                        └-> discriminator loss -> Adam      (every n_critic updates)

Two functions of fixed shapes hold all of it: `_gradients` (a batch to flat task gradients) and `_apply` (those to new weights). Eager,
compiled and captured as one CUDA graph they are the same functions. Schedules come in as tensors, the kind of update (who plays, who
learns) as two bools, and metrics go out as tensors on the device. An update whose losses or gradients are not finite changes nothing:
weights and averages move by zero, buffers that the forward pass learns (codebooks) are put back, and RGB guards its own state. `faults`
counts such updates and remembers what was bad, to be read when it suits the caller.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.config import Config, to_dict
from aime_fast.data import augment, normalise
from aime_fast.graph import Captured
from aime_fast.multi_task_learning import RGB, LossAggregator
from aime_fast.multi_task_learning.loss_aggregator import TASKS, TERMS
from aime_fast.spans import span
from aime_fast.training.adam import Adam
from aime_fast.training.arena import Arena, GradientRows
from aime_fast.training.ema import EMA
from aime_fast.training.faults import Faults, NonFiniteError, first_error

BATCH_KEYS = ("pixels", "action", "is_init")
MONITORS = ("perplexity", "code_usage", "token_accuracy", "slot_overlap")  # outputs that are logged and not optimised

# Outputs in the order in which the model computes them, so that the first bad one is where a fault began.
COMPUTED = (
    "tokens", "context", "posterior_mean", "posterior_logvar", "latents", "hidden", "mixture_weights", "component_means",
    "component_logvars", "slot_maps", "attention", "attention_prior", "movement", "reconstructions",
)  # fmt: skip

# Scalars that must be finite for an update to be made, in the order of computation.
CHECKED = (
    *(f"loss/{name}" for name in (*TERMS, *TASKS)),
    *(f"loss/{name}" for name in ("discriminator_image", "discriminator_temporal", "discriminator")),
    *(f"gradient_norm/{name}" for name in ("discriminator", *TASKS, "total")),
)

RECOMPILE_LIMIT = 64  # Dynamo's 8 is for all steps of a process together; each has several kinds of call

Compile = Literal["off", "on", "graph"]


class Warmups(NamedTuple):
    """What rises in the course of training, each a scalar on the device."""

    beta: Tensor  # factor of the KL terms' weight
    own_tokens: Tensor  # share of frames that the token predictor reads as it predicted them
    overshoot: Tensor  # factor of the roll-out's weight


class TrainingStep:
    """Model, EMA copy, optimizers and RGB joined into one update.

    Args:
        model: `DPGMMVariationalRecurrentAutoencoder` on its device. Its parameters move into flat arenas: do not move the model again.
        config: the run's settings.
        compile: "off" runs eagerly. "on" compiles: with CUDA everything, on a CPU the regions that gain (`compile_regions`).
            "graph", CUDA only, compiles everything and captures each kind of update (whether the generator plays, whether the
            discriminators learn) as one CUDA graph. The first call of each kind compiles, which takes minutes; the first calls of a
            captured step are ordinary updates.
    """

    def __init__(self, model: nn.Module, config: Config, compile: Compile = "off"):
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        optim = config.optim
        perceiver = list(model.perceiver_io.parameters())
        ids = {id(p) for p in perceiver}
        self.generator = Arena([*(p for p in model.get_share_params() if id(p) not in ids), *perceiver])
        self.discriminator = Arena(model.discriminator_parameters())
        self.ema = EMA(model, optim.ema_decay, (self.generator, self.discriminator))

        scales = [torch.full_like(p, optim.perceiver_lr_scale if id(p) in ids else 1.0) for p in self.generator.parameters]
        self.optimizer = Adam(self.generator.flat, optim.adam_beta1, scale=self.generator.flatten(scales))
        self.discriminator_optimizer = Adam(self.discriminator.flat)
        self.discriminator_lr = torch.tensor(optim.discriminator_lr, device=self.device)
        self._task_rows, self._discriminator_row = GradientRows(self.generator, len(TASKS)), GradientRows(self.discriminator, 1)
        self.gradient = torch.zeros_like(self.generator.flat)  # what RGB made of the task gradients, clipped

        self.losses = LossAggregator(**to_dict(config.loss))
        self.rgb = RGB(
            mu=optim.rgb_mu, lam=optim.rgb_lambda, alpha_steps=optim.rgb_alpha_steps, lr_inner=optim.rgb_lr_inner,
            aggregation=optim.aggregation,
        )  # fmt: skip
        self.rgb.reset(len(TASKS), self.generator.flat.numel(), self.device)
        self.faults = Faults(CHECKED, self.device)
        parameters = {name for name, _ in model.named_parameters()}
        self._learnt = [model.get_buffer(name) for name in model.state_dict() if name not in parameters]
        self._seen: list[dict[str, dict[str, Tensor]]] = []
        self._rows: tuple[Tensor | None, Tensor | None] = (None, None)
        self._captured: dict[tuple[bool, bool], Captured] = {}
        self._compiled = False
        if compile == "on" and self.device.type == "cpu":
            model.compile_regions()
        elif compile != "off":
            self.compile_whole()
        if compile == "graph":
            first = None
            for kind in itertools.product((False, True), repeat=2):
                self._captured[kind] = Captured(self._update_of(*kind), self.device, memory_of=first)
                first = first or self._captured[kind]

    def compile_whole(self, backend: str | Callable = "inductor") -> None:
        """`torch.compile` of both halves of the update, each as one graph without breaks."""
        if self.config.optim.gradient_penalty > 0:
            raise ValueError("--gradient-penalty differentiates twice, which cannot be traced; use it with --compile off")
        torch._dynamo.config.trace_autograd_ops = True  # the four task gradients are taken inside the compiled function
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        self._compiled = True
        options = {"fullgraph": True, "dynamic": False, "backend": backend}
        self._gradients = torch.compile(self._gradients, **options)
        self._apply = torch.compile(self._apply, **options)

    def __call__(
        self,
        batches: Sequence[TensorDict],
        beta: Tensor,
        learning_rate: Tensor,
        train_discriminator: bool,
        adversarial: bool = True,
        own_tokens: Tensor | float = 0.0,
        overshoot: Tensor | float = 1.0,
    ) -> TensorDict:
        """One update from `optim.accumulate` batches.

        Args:
            batches: on the device, with `pixels` uint8 [B, T, 3, H, W], `action` float32 [B, T, A], `is_init` bool [B, T, 1].
            beta: warm-up factor of the KL terms, a scalar tensor.
            learning_rate: of the generator, a scalar tensor.
            train_discriminator: whether the discriminators learn too.
            adversarial: whether the generator plays against them; if not, that gradient is not taken.
            own_tokens: share of frames that the token predictor reads as it predicted them.
            overshoot: warm-up factor of the model's own roll-out.

        Returns:
            TensorDict of scalar tensors on the device: `loss/*`, `model/*`, `gradient_norm/*`, `rgb/*`, the schedules, and
            `finite` (bool): whether the update was made. A captured step overwrites them at the next update.

        Raises:
            KeyError: a batch lacks a key.
        """
        for batch in batches:
            present = set(batch.keys())
            if missing := [key for key in BATCH_KEYS if key not in present]:
                raise KeyError(f"a batch lacks {', '.join(missing)}; it has {', '.join(sorted(present))}")
        inputs = [{key: batch[key] for key in BATCH_KEYS} for batch in batches]
        given = Warmups(beta, own_tokens, overshoot)
        warmups = Warmups(*(x if isinstance(x, Tensor) else torch.full((), float(x), device=self.device) for x in given))
        kind = train_discriminator, adversarial
        update = self._captured.get(kind) or self._update_of(*kind)
        metrics, self._seen, self._rows = update(inputs, learning_rate, warmups)
        return TensorDict(metrics, batch_size=[])

    def _update_of(self, train_discriminator: bool, adversarial: bool) -> Callable:
        def update(batches: list[dict[str, Tensor]], learning_rate: Tensor, warmups: Warmups):
            before = [buffer.clone() for buffer in self._learnt]
            share, metrics, rows, seen = 1.0 / len(batches), {}, (None, None), []
            if self._compiled and len(batches) > 1:  # adding to zeros from the first batch on saves compiling that batch by itself
                rows = self._task_rows.zeros(), self._discriminator_row.zeros() if train_discriminator else None
            for batch in batches:
                rows, scalars, outputs = self._gradients(batch, warmups, share, train_discriminator, adversarial, rows)
                metrics = {name: metrics[name] + value if name in metrics else value for name, value in scalars.items()}
                seen.append({"batch": batch, "output": outputs, "loss": scalars})
            metrics |= self._apply(*rows, metrics, before, learning_rate)
            return metrics | {"beta": warmups.beta, "learning_rate": learning_rate}, seen, rows

        return update

    def _gradients(
        self,
        batch: dict[str, Tensor],
        warmups: Warmups,
        share: float,
        train_discriminator: bool,
        adversarial: bool,
        before: tuple[Tensor | None, Tensor | None],
    ) -> tuple[tuple[Tensor, Tensor | None], dict[str, Tensor], dict[str, Tensor]]:
        """A batch -> (gradients of the tasks [n, P], of the discriminators [1, Pd] or None), scalars; outputs of the model.

        Losses count times `share`, and so do scalars; gradients are added to those `before`.
        """
        data, pixels = self.config.data, batch["pixels"]
        with span("step: augment"):
            observations = augment(pixels, data.max_shift, data.max_zoom) if data.augment else normalise(pixels)  # [B, T, 3, H, W]
        with span("step: forward"), self.autocast():
            outputs = self.model.infer_and_score(observations, batch["action"], batch["is_init"], self.ema.model, warmups.own_tokens)
        losses, task_losses = self.losses.compute_losses(outputs, warmups.beta, adversarial, warmups.overshoot)
        tasks = self._task_rows.gather({task: loss * share for task, loss in zip(TASKS, task_losses)}, before[0])

        outputs = {name: output.detach() for name, output in outputs.items()}
        metrics = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        metrics |= {f"model/{name}": outputs[name] for name in MONITORS}
        discriminator = None
        if train_discriminator:
            with span("step: forward discriminator"), self.autocast():
                loss, parts = self.model.discriminator_loss(outputs, observations, self.config.optim.gradient_penalty)
            discriminator = self._discriminator_row.gather({"discriminator": loss * share}, before[1])
            metrics |= {f"loss/{name}": part.detach() for name, part in (parts | {"discriminator": loss}).items()}
        metrics = {name: value * share for name, value in metrics.items()}
        return (tasks, discriminator), metrics, {name: outputs[name] for name in COMPUTED}

    def _apply(
        self, tasks: Tensor, discriminator: Tensor | None, metrics: dict[str, Tensor], before: list[Tensor], learning_rate: Tensor
    ) -> dict[str, Tensor]:
        """Gradients to new weights: tasks [n, P], discriminator [1, Pd]; `before` are the learnt buffers as they were."""
        optim = self.config.optim
        checked = {name: metrics[name] for name in CHECKED if name in metrics}
        if discriminator is not None:
            checked["gradient_norm/discriminator"] = torch.linalg.vector_norm(discriminator)
        # RGB keeps its state where its own result is not finite; a fault that its gradients do not show is shown to it.
        good = torch.isfinite(torch.stack(list(checked.values()))).all()
        tasks[0, 0] = torch.where(good, tasks[0, 0], torch.nan)
        with span("step: RGB"):
            _, rotation = self.rgb.rotate(tasks, max_norm=optim.grad_clip, out=self.gradient)
        norms = dict(zip(TASKS, torch.where(good, rotation["gradient_norms"], 0.0).unbind()))  # no blame for the mark above
        checked |= {f"gradient_norm/{task}": norm for task, norm in norms.items()}
        checked["gradient_norm/total"] = torch.where(good, rotation["result_norm"], 0.0)
        finite = self.faults.record(checked)
        with span("step: Adam"):
            self.optimizer.update(self.gradient, learning_rate, finite)
            if discriminator is not None:
                clip = (optim.grad_clip / (checked["gradient_norm/discriminator"] + 1e-6)).clamp(max=1.0)
                self.discriminator_optimizer.update(discriminator[0] * clip, self.discriminator_lr, finite)
        for buffer, old in zip(self._learnt, before):
            buffer.copy_(torch.where(finite, buffer, old))
        with span("step: EMA"):
            self.ema.update(finite)
        return {
            **{name: value for name, value in checked.items() if name not in metrics},
            **{f"rgb/angle_{task}": angle for task, angle in zip(TASKS, rotation["angles"].unbind())},
            **{f"rgb/cosine_{TASKS[i]}_{TASKS[j]}": rotation["cosine"][i, j] for i, j in itertools.combinations(range(len(TASKS)), 2)},
            "finite": finite,
        }

    def autocast(self) -> torch.autocast:
        """The mixed precision of `--precision`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    def diagnose(self, step: int) -> NonFiniteError:
        """The first bad term of the update just made, in the order of computation. Call it where `finite` came out false."""
        bad_parameter = first_error(((f"parameter {n}", p) for n, p in self.model.named_parameters()), step)
        error = first_error(self._terms(), step)
        if error is None:
            error = NonFiniteError(f"gradient norm at step {step}: overflows although every element is finite")
        return error if bad_parameter is None else NonFiniteError(f"{error}. Its source may be {bad_parameter}")

    def _terms(self) -> Iterator[tuple[str, Tensor]]:
        for seen in self._seen:
            yield from ((f"batch {key!r}", seen["batch"][key]) for key in BATCH_KEYS)
            yield from ((f"output {key!r}", seen["output"][key]) for key in COMPUTED)
            yield from ((name, value) for name, value in seen["loss"].items() if name.startswith("loss/"))
        names = {id(p): name for name, p in self.model.named_parameters()}
        tasks, discriminator = self._rows
        # The discriminators first: `_apply` marks the tasks' rows where the fault is elsewhere.
        rows = [("the discriminator loss", self.discriminator, discriminator[0])] if discriminator is not None else []
        rows += [(f"task {task!r}", self.generator, row) for task, row in zip(TASKS, tasks)]
        for whose, arena, row in rows:
            for parameter, view in zip(arena.parameters, arena.split(row)):
                yield f"gradient of {whose} for {names[id(parameter)]}", view

    def state_dict(self) -> dict[str, Any]:
        """Weights, EMA, both optimizers, RGB and the count of updates not made."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "rgb": self.rgb.state_dict(),
            "faults": self.faults.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; tensors may lie on any device."""
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.ema.updates.copy_(state["ema_updates"])
        self.rgb.load_state_dict(state["rgb"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        self.faults.load_state_dict(state["faults"])
