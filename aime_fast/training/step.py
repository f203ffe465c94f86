"""One update of AIME, from a batch of frames to new weights, with nothing read back to the host.

    single frames -> encoder, decoder -> Adam                      (`--stills` times)
    sequences -> perceiver -> Adam              (in every other one of the first `--picture-steps`, which do no more than these two)
    pixels -> augment -> infer_and_score -> LossAggregator -> four task gradients -> RGB -> clip -> Adam -> EMA
                                       └-> discriminator loss -> Adam      (every n_critic updates)

`update` is the whole of it, in two halves of fixed shapes: `compute_gradients` (a batch to flat gradients) and `apply_gradients` (those to
new weights). `execution.py` runs it eagerly, compiled or captured as one CUDA graph. Schedules come in as tensors, the kind of update as
two bools, and metrics go out as tensors on the device. An update whose losses or gradients are not finite changes nothing: weights and
averages move by zero, buffers that the forward pass learns (codebooks) are restored, and RGB guards its own state. `faults` counts such
updates and remembers which terms were not finite, to be read when it suits the caller. Updates on single frames (`stills.py`) and of
the perceiver alone (`perception.py`) stand for themselves: each is made or not, and those before an update that is not made
remain. They are captured, but never compiled.

Several processes make one update together, each with its share of the batches (`runtime.ranks`): gradients and scalars are averaged
between the two halves, and everything after that is the same in each. A row of gradients is sent while the next task is differentiated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.config import Config
from aime_fast.data import augment, normalise
from aime_fast.errors import NonFiniteError
from aime_fast.multi_task_learning import RGB, LossAggregator
from aime_fast.multi_task_learning.loss_aggregator import BESIDE, TASKS, TERMS
from aime_fast.runtime import ranks, streams
from aime_fast.runtime.machine import WAYS, Compile
from aime_fast.runtime.spans import span
from aime_fast.training.adam import Adam, clip_factor
from aime_fast.training.arena import Arena, GradientRows
from aime_fast.training.ema import EMA
from aime_fast.training.execution import Execution, Kind
from aime_fast.training.faults import Faults, first_error
from aime_fast.training.perception import GRADIENT_NORM, PerceptionUpdates
from aime_fast.training.stills import STILLS, StillUpdates

BATCH_KEYS = ("pixels", "action", "reward", "discount", "is_init")  # and "stills" with --stills
MONITORS = ("perplexity", "code_usage", "token_accuracy", "slot_overlap")  # outputs that are logged and not optimised

# Outputs in the order in which the model computes them: the first that is not finite is where a fault began.
COMPUTED = (
    "tokens", "context", "posterior_mean", "posterior_logvar", "latents", "hidden", "mixture_weights", "component_means",
    "component_logvars", "slot_maps", "attention", "attention_prior", "movement", "reconstructions",
)  # fmt: skip

# Scalars that must be finite for an update to be made, in the order of computation.
CHECKED = (
    *STILLS,
    *(f"loss/{name}" for name in (*TERMS, *TASKS)),
    *(f"loss/{name}" for name in ("discriminator_image", "discriminator_temporal", "discriminator")),
    *(f"gradient_norm/{name}" for name in ("discriminator", *TASKS, "total")),
    GRADIENT_NORM,
)


class Warmups(NamedTuple):
    """What rises in the course of training, each a scalar on the device."""

    beta: Tensor  # factor of the KL terms' weight
    own_tokens: Tensor  # share of input frames whose tokens are the predictor's own prediction
    overshoot: Tensor  # factor of the weight of imagined frames


class Gradients(NamedTuple):
    """Flat gradients, summed over the batches of an update."""

    tasks: Tensor | None = None  # [n, P], a row for each task
    discriminator: Tensor | None = None  # [1, Pd]


def on_device(given: Mapping[str, float | bool], device: torch.device) -> dict[str, Tensor | bool]:
    """What `Schedules` gives an update, its numbers as scalar tensors on the device."""
    return {name: x if isinstance(x, bool) else torch.full((), x, device=device) for name, x in given.items()}


class TrainingStep:
    """Model, EMA copy, optimizers and RGB joined into one update.

    Args:
        model: `DPGMMVariationalRecurrentAutoencoder` on its device. Its parameters move into flat arenas: do not move the model again.
        config: the run's settings.
        compile: a key of `WAYS`. The first update of each kind compiles; the first updates of a captured step are ordinary ones.
    """

    def __init__(self, model: nn.Module, config: Config, compile: Compile = "off"):
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        optim = config.optim
        towers, perceiver = [*model.encoder.parameters(), *model.decoder.parameters()], list(model.perceiver_io.parameters())
        scale_of = {id(p): optim.towers_lr_scale for p in towers} | {id(p): optim.perceiver_lr_scale for p in perceiver}
        self.generator = Arena([*towers, *(p for p in model.get_share_params() if id(p) not in scale_of), *perceiver])
        self.discriminator = Arena(model.discriminator_parameters())
        self.ema = EMA(model, optim.ema_decay, (self.generator, self.discriminator))

        scales = [torch.full_like(p, scale_of.get(id(p), 1.0)) for p in self.generator.parameters]
        self.optimizer = Adam(self.generator.flat, optim.adam_beta1, scale=self.generator.flatten(scales))
        self.discriminator_optimizer = Adam(self.discriminator.flat)
        self.stills = StillUpdates(model, self.generator, config.data.stills, config.loss, optim.grad_clip, optim.adam_beta1)
        self.losses = LossAggregator(config.loss)
        self.perception = PerceptionUpdates(model, self.generator, self.losses, optim.perceiver_lr_scale, optim.grad_clip, optim.adam_beta1)
        self.discriminator_lr = torch.tensor(optim.discriminator_lr, device=self.device)
        self._task_rows, self._discriminator_row = GradientRows(self.generator, len(TASKS)), GradientRows(self.discriminator, 1)
        self.gradient = torch.zeros_like(self.generator.flat)  # balanced by RGB and clipped

        self.rgb = RGB(
            mu=optim.rgb_mu, lam=optim.rgb_lambda, alpha_steps=optim.rgb_alpha_steps, lr_inner=optim.rgb_lr_inner,
            aggregation=optim.aggregation,
        )  # fmt: skip
        self.rgb.reset(len(TASKS), self.generator.flat.numel(), self.device)
        self.faults = Faults(CHECKED, self.device)
        parameters = {name for name, _ in model.named_parameters()}
        self._learnt = [model.get_buffer(name) for name in model.state_dict() if name not in parameters]
        self._evidence: list[dict[str, dict[str, Tensor]]] = []  # of the last update, for `diagnose`
        self._gradients = Gradients()
        self.execution = Execution(self, WAYS[compile])

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
            batches: on the device, with `pixels` uint8 [B, T, 3, H, W], `action` float32 [B, T, A], `reward` and `discount`
                float32 [B, T, 1], `is_init` bool [B, T, 1].
            beta: warm-up factor of the KL terms, a scalar tensor.
            learning_rate: of the generator, a scalar tensor.
            train_discriminator: whether the discriminators learn too.
            adversarial: whether the generator has an adversarial task; if not, that gradient is not computed.
            own_tokens: share of input frames whose tokens are the predictor's own prediction.
            overshoot: warm-up factor of the weight of imagined frames.

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
        inputs = [{key: batch[key] for key in (*BATCH_KEYS, "stills") if key in present} for batch in batches]
        given = Warmups(beta, own_tokens, overshoot)
        warmups = Warmups(*(x if isinstance(x, Tensor) else torch.full((), float(x), device=self.device) for x in given))
        kind = Kind(train_discriminator, adversarial)
        with ranks.sharing():
            metrics, self._evidence, self._gradients = self.execution(kind, inputs, learning_rate, warmups)
        return TensorDict(metrics, batch_size=[])

    def learn_pictures(self, batches: Sequence[TensorDict], learning_rate: Tensor, perceives: bool = True) -> TensorDict:
        """Updates of encoder and decoder alone, on the single frames of the batches, and of the perceiver alone, on their sequences.

        Args: batches with `stills` uint8 [B, T, 3, H, W], and what `__call__` takes; learning_rate: a scalar tensor; perceives: whether
        the perceiver learns too.

        Returns: TensorDict of scalar tensors on the device: `stills.STILLS`, those of `PerceptionUpdates`, `learning_rate`, and `finite`:
        whether all were made.
        """
        inputs = [{key: batch[key] for key in (*BATCH_KEYS, "stills")} for batch in batches]
        with ranks.sharing():
            metrics, self._evidence = self.execution.pictures(perceives, inputs, learning_rate)
        self._gradients = Gradients()
        return TensorDict(metrics, batch_size=[])

    def update_pictures(
        self, perceives: bool, batches: list[dict[str, Tensor]], learning_rate: Tensor
    ) -> tuple[dict[str, Tensor], list[dict[str, dict[str, Tensor]]]]:
        """What `learn_pictures` does. Returns: (metrics, scalars by name; batch and losses of each batch)."""
        scalars = []
        for batch in batches:
            scalars.append(self._learn_stills(batch, learning_rate, attends=False))
            if perceives:
                scalars[-1] |= self._learn_perception(batch, learning_rate)
        metrics = ranks.means({name: sum(of_batch[name] for of_batch in scalars) / len(batches) for name in scalars[0]})
        finite = self.faults.record(metrics)
        self.ema.update(finite)
        evidence = [{"batch": batch, "output": {}, "loss": metrics} for batch in batches]
        return metrics | {"learning_rate": learning_rate, "finite": finite}, evidence

    def update(
        self, kind: Kind, batches: list[dict[str, Tensor]], learning_rate: Tensor, warmups: Warmups
    ) -> tuple[dict[str, Tensor], list[dict[str, dict[str, Tensor]]], Gradients]:
        """From batches to new weights; `execution` has the two halves as they are executed.

        Returns: (metrics, scalars by name; batch, outputs and losses of each batch; the gradients, before RGB).
        """
        learnt_before = [buffer.clone() for buffer in self._learnt]
        gradients, metrics, evidence = Gradients(), {}, []
        if self.execution.whole and len(batches) > 1:  # the first batch adds to zeros: without them it would be compiled by itself
            zeros = self._discriminator_row.zeros() if kind.train_discriminator else None
            gradients = Gradients(self._task_rows.zeros(), zeros)
        with span("step: augment"):
            observed = [{key: batch[key] for key in BATCH_KEYS} | {"pixels": self._observe(batch["pixels"])} for batch in batches]
        streams.fork("perceiver")
        # First: all gradients are of the same weights. Perception, whose weights stay, need not wait for it.
        stills = [self._learn_stills(batch, learning_rate) for batch in batches]
        averages = ranks.Averages()
        for i, (batch, inputs, of_stills) in enumerate(zip(batches, observed, stills), 1):
            complete = averages.begin if i == len(batches) and ranks.size() > 1 else None
            gradients, scalars, outputs = self.execution.compute_gradients(kind, inputs, warmups, 1.0 / len(batches), gradients, complete)
            scalars |= {name: value if len(batches) == 1 else value / len(batches) for name, value in of_stills.items()}
            metrics = {name: metrics[name] + value if name in metrics else value for name, value in scalars.items()}
            evidence.append({"batch": batch, "output": outputs, "loss": scalars})
        # Before RGB, which is not linear: balanced gradients of parts of a batch do not add up to the balanced gradient of the batch.
        averages.wait()
        metrics = ranks.means(metrics)
        metrics |= self.execution.apply_gradients(gradients, metrics, learnt_before, learning_rate)
        return metrics | {"beta": warmups.beta, "learning_rate": learning_rate}, evidence, gradients

    def compute_gradients(
        self,
        kind: Kind,
        batch: dict[str, Tensor],
        warmups: Warmups,
        share: float,
        before: Gradients,
        complete: Callable[[Tensor], None] | None = None,
    ) -> tuple[Gradients, dict[str, Tensor], dict[str, Tensor]]:
        """A batch, its pixels in [-1, 1] -> (gradients added to those `before`, scalars by name, outputs of the model by name).

        Losses and scalars are multiplied by `share`. `complete` is called with each row of gradients as soon as it is made,
        or with the part of it that is not zero, the tasks' first.
        """
        observations = batch["pixels"]  # [B, T, 3, H, W]
        ema = self.ema.model if self.config.loss.lambda_gram else None
        with span("step: forward"), self.autocast():
            outputs = self.model.infer_and_score(
                observations,
                batch["action"],
                batch["is_init"],
                ema,
                warmups.own_tokens,
                ahead=before.tasks is None,
                brought=(batch["reward"], batch["discount"]),
            )
        losses, task_losses = self.losses.compute_losses(outputs, warmups.beta, kind.adversarial, warmups.overshoot)
        outputs = {name: output.detach() for name, output in outputs.items()}
        metrics = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        metrics |= {f"model/{name}": outputs[name] for name in MONITORS}
        judging, judged = (outputs, observations, share, before.discriminator), None
        if kind.train_discriminator and streams.has_side_streams():
            judged = streams.beside("discriminators", self._train_discriminators, *judging)
        tasks = self._task_rows.gather(dict(zip(TASKS, task_losses)), before.tasks, share, BESIDE, complete)
        del losses, task_losses  # and the graph with them
        discriminator = None
        if kind.train_discriminator:  # with one stream after the tasks, whose graph is freed by then
            discriminator, scalars = judged() if judged else self._train_discriminators(*judging)
            if complete is not None:
                complete(discriminator[0])
            metrics |= scalars
        # A product with 1 would be a kernel each.
        metrics = metrics if share == 1 else {name: value * share for name, value in metrics.items()}
        return Gradients(tasks, discriminator), metrics, {name: outputs[name] for name in COMPUTED}

    def _train_discriminators(
        self, outputs: dict[str, Tensor], observations: Tensor, share: float, before: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminators' part of `compute_gradients`: (gradient [1, Pd], scalars by name)."""
        with span("step: forward discriminator"), self.autocast():
            loss, parts = self.model.discriminator_loss(outputs, observations, self.config.optim.gradient_penalty)
        gradient = self._discriminator_row.gather({"discriminator": loss}, before, share)
        return gradient, {f"loss/{name}": part.detach() for name, part in (parts | {"discriminator": loss}).items()}

    def _observe(self, pixels: Tensor) -> Tensor:
        data = self.config.data
        return augment(pixels, data.max_shift, data.max_zoom) if data.augment else normalise(pixels)

    def _learn_stills(self, batch: dict[str, Tensor], learning_rate: Tensor, attends: bool = True) -> dict[str, Tensor]:
        """Updates of encoder and decoder alone; returns their scalars by name, none where the batch has no single frames."""
        if "stills" not in batch:
            return {}
        frames = self._observe(batch["stills"].flatten(0, 1).unsqueeze(1)).squeeze(1)  # each is a sequence of one
        return self.stills(frames, learning_rate, self.autocast(), attends)

    def _learn_perception(self, batch: dict[str, Tensor], learning_rate: Tensor) -> dict[str, Tensor]:
        """An update of the perceiver alone; returns its scalars by name."""
        return self.perception(self._observe(batch["pixels"]), batch["action"], batch["is_init"], learning_rate, self.autocast())

    def apply_gradients(
        self, gradients: Gradients, metrics: dict[str, Tensor], learnt_before: list[Tensor], learning_rate: Tensor
    ) -> dict[str, Tensor]:
        """Gradients -> new weights. `learnt_before`: the learnt buffers before the update. Returns further metrics, scalars by name."""
        optim, (tasks, discriminator) = self.config.optim, gradients
        checked = {name: metrics[name] for name in CHECKED if name in metrics}
        if discriminator is not None:
            checked["gradient_norm/discriminator"] = torch.linalg.vector_norm(discriminator)
        good = torch.isfinite(torch.stack(list(checked.values()))).all()
        # RGB leaves its state unchanged where its result is not finite. Mark the update as bad, since its gradients may be finite.
        tasks[0, 0] = torch.where(good, tasks[0, 0], torch.nan)
        with span("step: RGB"):
            _, rotation = self.rgb.rotate(tasks, max_norm=optim.grad_clip, out=self.gradient)
        norms = dict(zip(TASKS, torch.where(good, rotation["gradient_norms"], 0.0).unbind()))  # the mark above is no fault of a task
        checked |= {f"gradient_norm/{task}": norm for task, norm in norms.items()}
        checked["gradient_norm/total"] = torch.where(good, rotation["result_norm"], 0.0)
        finite = self.faults.record(checked)
        with span("step: Adam"):
            self.optimizer.update(self.gradient, learning_rate, finite)
            if discriminator is not None:
                clip = clip_factor(checked["gradient_norm/discriminator"], optim.grad_clip)
                self.discriminator_optimizer.update(discriminator[0] * clip, self.discriminator_lr, finite)
        for buffer, old in zip(self._learnt, learnt_before):
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
        if error is None and self._gradients.tasks is None:
            norms = {name: one["loss"][name] for one in self._evidence for name in (STILLS[-1], GRADIENT_NORM) if name in one["loss"]}
            whose = next((name.partition("/")[2] for name, norm in norms.items() if not norm.isfinite()), STILLS[-1])
            error = NonFiniteError(f"gradient of {whose} at step {step}: not finite, although the loss is")
        if error is None:
            error = NonFiniteError(f"gradient norm at step {step}: overflows although every element is finite")
        return error if bad_parameter is None else NonFiniteError(f"{error}. Its source may be {bad_parameter}")

    def _terms(self) -> Iterator[tuple[str, Tensor]]:
        for one in self._evidence:
            yield from ((f"batch {key!r}", one["batch"][key]) for key in one["batch"])
            yield from ((f"output {key!r}", one["output"][key]) for key in COMPUTED if key in one["output"])
            yield from ((name, value) for name, value in one["loss"].items() if name.startswith("loss/"))
        names = {id(p): name for name, p in self.model.named_parameters()}
        tasks, discriminator = self._gradients
        # The discriminators first: `apply_gradients` marks the tasks' rows where the fault is elsewhere.
        rows = [("the discriminator loss", self.discriminator, discriminator[0])] if discriminator is not None else []
        rows += [(f"task {task!r}", self.generator, row) for task, row in zip(TASKS, () if tasks is None else tasks)]
        for whose, arena, row in rows:
            for parameter, view in zip(arena.parameters, arena.split(row)):
                yield f"gradient of {whose} for {names[id(parameter)]}", view

    def state_dict(self) -> dict[str, Any]:
        """Weights, EMA, all optimizers, RGB and the count of updates not made."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "stills_optimizer": self.stills.optimizer.state_dict(),
            "perception_optimizer": self.perception.optimizer.state_dict(),
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
        self.stills.optimizer.load_state_dict(state["stills_optimizer"])
        self.perception.optimizer.load_state_dict(state["perception_optimizer"])
        self.faults.load_state_dict(state["faults"])
