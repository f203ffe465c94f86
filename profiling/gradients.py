"""Which loss term trains which module: `python -m profiling.gradients --run RUN [--batches 4] [--set lambda_gram=0.05 ...] [--json FILE]`.

For each term of the four task losses, as it is weighed, the norm of its gradient in each part of a trained model, a mean over training
batches, without augmentation. A term whose norm is a thousandth of another's in the modules that it is there for does nothing. RGB
turns and sums the four tasks' gradients afterwards; terms of one task are compared here as they enter it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from aime_fast.bounds import Count, check
from aime_fast.cli import parse_arguments, run_command
from aime_fast.config import LossConfig
from aime_fast.data import make_batches, normalise
from aime_fast.errors import ConfigError
from aime_fast.multi_task_learning import LossAggregator
from aime_fast.multi_task_learning.loss_aggregator import TERMS
from aime_fast.runtime.machine import choose_device
from aime_fast.training.checkpoint import load_model
from profiling.machine import describe, title, write_json

PARTS = (
    "perceiver_io.tokenizer", "perceiver_io.dense", "perceiver_io.time", "perceiver_io.predictor", "encoder", "decoder", "prior",
    "recurrence", "attention.posterior", "attention.prior",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GradientsConfig:
    """What to measure."""

    run: str  # a run folder or a checkpoint
    data: str | None = None  # other data than the run's
    batches: Count = 4  # training batches
    set: tuple[str, ...] = ()  # NAME=VALUE: weights of the losses other than the run's
    device: str = "auto"  # cpu, cuda, cuda:N or auto
    json: str | None = None  # file to write


def weights(config: LossConfig, changes: Iterable[str]) -> LossConfig:
    """The weights with `changes`, each NAME=VALUE. Raises ConfigError naming one that is not a weight."""
    for change in changes:
        name, _, value = change.partition("=")
        try:
            config = dataclasses.replace(config, **{name: type(getattr(config, name))(float(value))})
        except (AttributeError, TypeError, ValueError):
            known = ", ".join(field.name for field in dataclasses.fields(config))
            raise ConfigError(f"--set {change}: expected NAME=NUMBER with one of {known}") from None
    check(config)
    return config


def term_gradients(model: nn.Module, ema: nn.Module, batch, losses: LossAggregator) -> dict[str, dict[str, float]]:
    """By term: `weighed`, its share of its task loss, and the norm of its gradient in each of `PARTS`. The model is in train mode."""
    brought = batch["reward"], batch["discount"]
    outputs = dict(model.infer_and_score(normalise(batch["pixels"]), batch["action"], batch["is_init"], ema, brought=brought).items())
    terms = {name: outputs[name].detach().requires_grad_() for name in TERMS}
    tasks = losses.compute_losses(outputs | terms)[1]
    factors = torch.autograd.grad(sum(tasks), list(terms.values()), allow_unused=True)  # the task losses are linear in the terms
    parameters = {part: list(model.get_submodule(part).parameters()) for part in PARTS}
    measured = {}
    for name, factor in zip(terms, factors):
        if factor is None or not factor or not outputs[name].requires_grad:
            continue
        loss: Tensor = factor * outputs[name]
        gradients = iter(torch.autograd.grad(loss, list(itertools.chain(*parameters.values())), retain_graph=True, allow_unused=True))
        measured[name] = {"weighed": loss.item()} | {part: _norm([next(gradients) for _ in found]) for part, found in parameters.items()}
    return measured


def _norm(gradients: list[Tensor | None]) -> float:
    found = [gradient.flatten() for gradient in gradients if gradient is not None]
    return torch.cat(found).norm().item() if found else 0.0


def measure(options: GradientsConfig) -> dict[str, dict[str, float]]:
    """`term_gradients`, mean over the batches. Raises ConfigError, CheckpointError, DataError."""
    check(options)
    device = choose_device(options.device)
    model, config, info = load_model(options.run, device, ema=False)
    ema = load_model(info["checkpoint"], device)[0]
    losses = LossAggregator(weights(config.loss, options.set))
    data = dataclasses.replace(config.data, data=options.data or config.data.data, prefetch=0)
    (training,) = make_batches(data, config.run.seed, device, info["split"], parts=("training",))
    learnt = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    sums: dict[str, dict[str, float]] = {}
    for batch in (next(training) for _ in range(options.batches)):
        for term, values in term_gradients(model.train(), ema, batch, losses).items():
            old = sums.setdefault(term, dict.fromkeys(values, 0.0))
            sums[term] = {name: old[name] + value / options.batches for name, value in values.items()}
        for name, buffer in model.named_buffers():  # the codebook learns in train mode
            buffer.copy_(learnt[name])
    training.close()
    return sums


def table(measured: dict[str, dict[str, float]]) -> str:
    """Terms down, parts across; a gradient that does not reach a part is a dot."""
    names = {part: part.removeprefix("perceiver_io.") for part in PARTS}
    widths = {part: max(9, len(name) + 2) for part, name in names.items()}
    lines = [f"{'term':<21}{'weighed':>10}" + "".join(f"{names[part]:>{width}}" for part, width in widths.items())]
    for term, values in measured.items():
        cells = "".join(f"{f'{values[part]:.1e}' if values[part] else '.':>{width}}" for part, width in widths.items())
        lines.append(f"{term:<21}{values['weighed']:>10.3g}" + cells)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options, measure, print the table."""
    options = parse_arguments(GradientsConfig, "python -m profiling.gradients", "Gradient norms of each loss term by module.", argv)
    measured = measure(options)
    device = choose_device(options.device)
    head = describe(device)
    print(f"{options.run} on {title(device)}, commit {head['git_commit']}\n{table(measured)}")
    if options.json:
        write_json(options.json, head | {"terms": measured})


if __name__ == "__main__":
    run_command(main)
