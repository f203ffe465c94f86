"""One run of which one thing is different: `python -m profiling.pillars VARIANT SPEC FILE`; VARIANT may be flags, which SPEC's run has.

The trainer is that of `aime_fast.train`; the change is made to it from outside, before its first step, so that the product has no switches
for what nobody should switch off. SPEC is a JSON file with `config` of a run, and `context`, `horizon`, `clips`, `samples` of its films and
their `part`; FILE gets what was measured, on episodes of that part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aime_fast.config import from_dict
from aime_fast.multi_task_learning.loss_aggregator import TASKS
from aime_fast.runtime.provenance import git_commit
from aime_fast.training import DMCVBTrainer, latent_phase
from aime_fast.training.adam import clip_factor
from profiling.machine import write_json

IMPOSSIBLE = -1e4  # log-weight of a component that is switched off
MOST = 8  # times as heavy as the background is a pixel that differs from it
DIFFERS = 0.3  # by so much in any channel, of 2


def _hook(trainer: DMCVBTrainer, module: str, change: Callable[[Any], Any]) -> None:
    """The output of a module of the model and of its moving average goes through `change`."""
    for model in (trainer.model, trainer.ema):
        model.get_submodule(module).register_forward_hook(lambda _module, _inputs, output: change(output))


def without_attention(trainer: DMCVBTrainer) -> None:
    """Inferred and predicted maps are uniform."""

    def uniform(like: Tensor) -> Tensor:
        return torch.full_like(like, 1 / like[0].numel())

    _hook(trainer, "attention.posterior", lambda maps: maps._replace(attention=uniform(maps.attention)))
    _hook(trainer, "attention.prior", lambda found: found._replace(log_attention=uniform(found.log_attention).log()))


def without_context(trainer: DMCVBTrainer) -> None:
    """The context is zero."""
    _hook(trainer, "perceiver_io.out", torch.zeros_like)


def one_component(trainer: DMCVBTrainer) -> None:
    """The mixture has its first component alone, and its weights no posterior."""

    def alone(sticks: Any) -> Any:
        log_pi = torch.full_like(sticks.log_pi, IMPOSSIBLE)
        log_pi[..., 0] = 0.0
        return sticks._replace(log_pi=log_pi, kl=None if sticks.kl is None else torch.zeros_like(sticks.kl))

    _hook(trainer, "prior.sticks", alone)


def series_of_ten(trainer: DMCVBTrainer) -> None:
    """The KL of the sticks by AIME's ten terms."""
    for model in (trainer.model, trainer.ema):
        model.prior.kl_method = "series10"


def without_token_task(trainer: DMCVBTrainer) -> None:
    """Tokenizer, context and predictor learn nothing."""
    losses = trainer.training_step.losses
    compute = losses.compute_losses

    def others_alone(*arguments: Any, **options: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
        terms, tasks = compute(*arguments, **options)
        return terms, [0.0 * loss if task == "perceiver" else loss for task, loss in zip(TASKS, tasks)]

    losses.compute_losses = others_alone
    trainer.training_step._learn_perception = lambda *_: {}


def without_adversary(trainer: DMCVBTrainer) -> None:
    """No adversarial task, and no discriminators."""
    given = trainer.schedules.joint
    trainer.schedules.joint = lambda step: given(step) | {"adversarial": False, "train_discriminator": False}


def joined_by(aggregate: Callable[[Tensor], Tensor]) -> Callable[[DMCVBTrainer], None]:
    """The tasks' gradients [4, P] become one [P] by `aggregate` instead of RGB."""

    def change(trainer: DMCVBTrainer) -> None:
        rgb = trainer.training_step.rgb

        def rotate(gradients: Tensor, max_norm: float, out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            result = aggregate(gradients)
            norm = torch.linalg.vector_norm(result)
            torch.mul(result, clip_factor(norm, max_norm), out=out)
            tasks = len(gradients)
            norms = torch.linalg.vector_norm(gradients, dim=1)
            return out, {"gradient_norms": norms, "cosine": torch.zeros(tasks, tasks), "angles": torch.zeros(tasks), "result_norm": norm}

        rgb.rotate = torch.no_grad()(rotate)

    return change


def by_torchjd(name: str) -> Callable[[DMCVBTrainer], None]:
    """The tasks' gradients are joined by an aggregator of TorchJD. Raises RuntimeError where it is not installed."""

    def change(trainer: DMCVBTrainer) -> None:
        try:
            from torchjd import aggregation

            aggregator = getattr(aggregation, name)()  # may need a solver
        except ImportError as error:
            raise RuntimeError(f"{name} is TorchJD's ({error}): install the extra bench, or leave this variant out") from None
        joined_by(aggregator)(trainer)

    return change


def weighed_pixels(trainer: DMCVBTrainer) -> None:
    """Pixels that differ from the background count up to `MOST` times at first, as the others at the end of the picture steps."""
    given, likelihood, background = trainer.schedules.picture, trainer.model.decoder.likelihood, trainer.model.encoder.background
    more, nll = [0.0], likelihood.nll
    steps = trainer.config.optim.picture_steps

    def picture(step: int) -> dict[str, Any]:
        more[0] = (MOST - 1) * max(0.0, 1 - step / steps)
        return given(step)

    def joint(step: int) -> dict[str, Any]:
        more[0] = 0.0
        return of_joint(step)

    def weighed(parameters: Tensor, frames: Tensor) -> Tensor:
        differs = (frames - background).abs().amax(1, keepdim=True).clamp_max(DIFFERS) / DIFFERS
        extra = more[0] * (differs * (frames - parameters).square()).flatten(1).sum(1) / (2 * likelihood.std**2)
        return nll(parameters, frames) + extra

    of_joint = trainer.schedules.joint
    trainer.schedules.picture, trainer.schedules.joint, likelihood.nll = picture, joint, weighed


def late_decay(trainer: DMCVBTrainer) -> None:
    """The latent phase's rate is constant for 70 % of its updates, and then falls in a straight line."""
    latent_phase.falling = lambda share: min(1.0, (1 - share) / 0.3)


# name: (in words, the change)
VARIANTS: dict[str, tuple[str, Callable[[DMCVBTrainer], None]]] = {
    "whole": ("the whole model", lambda trainer: None),
    "attention": ("no attention: uniform maps", without_attention),
    "context": ("no context: zeros", without_context),
    "mixture": ("one component", one_component),
    "tokens": ("no token task", without_token_task),
    "adversary": ("no adversary", without_adversary),
    "sum": ("a plain sum instead of RGB", joined_by(lambda gradients: gradients.sum(0))),
    "upgrad": ("UPGrad instead of RGB", by_torchjd("UPGrad")),
    "pcgrad": ("PCGrad instead of RGB", by_torchjd("PCGrad")),
    "series": ("ten terms instead of the exact KL", series_of_ten),
    "pixels": (f"pixels off the background weighed up to {MOST} times, annealed", weighed_pixels),
    "late": ("latent phase: a constant rate that falls late", late_decay),
}


def run(variant: str, given: dict[str, Any]) -> dict[str, Any]:
    """Train one variant and measure it: {variant, seed, commit, seconds, validation, films}."""
    from profiling.learning.scores import hold_out, measure

    trainer = DMCVBTrainer(from_dict(given["config"]))
    if not variant.startswith("-"):
        VARIANTS[variant][1](trainer)
    result = trainer.train()
    held = hold_out(trainer.config, given["context"], given["horizon"], given["clips"], given["part"])
    return {
        "variant": variant,
        "part": given["part"],
        "seed": trainer.config.run.seed,
        "commit": git_commit(),
        "seconds": trainer.seconds,
        "validation": result["validation"],
        "films": measure(trainer.ema, held, given["samples"]),
    }


if __name__ == "__main__":
    write_json(Path(sys.argv[3]), run(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())))
