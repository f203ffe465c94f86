"""Eleven checks for collapse on logged scalars, each with a threshold, its reason and a remedy.

A check reads the names of `metrics.jsonl` and returns a `Reading`, or None where what it needs was not logged. `Watch` reports a
collapse that shows in `PATIENCE` validations in a row: once when it begins, once when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# A head that uses less than a tenth of its codes loses more than 3 of its log2(V) bits.
DEAD_CODEBOOK = 0.1
# exp(entropy) of the mixture weights averaged over all frames: at 1.2 one component holds at least 95 % of the weight.
ONE_COMPONENT = 1.2
# Mean cosine of two slots' maps: at 0.95, 18 degrees, the difference of two maps is less than a third of their length.
SLOTS_ALIKE = 0.95
# Nats for each latent dimension: 0.5 log(1 + signal / noise) = 0.01 is a signal of 2 % of the noise, about where Burda et al. (arXiv
# 1509.00519) call a unit inactive. A latent in use stays above it, since the first frame of a sequence has no past to be predicted from.
KL_AT_ZERO = 0.01
# -log D(x) - log(1 - D(x_hat)) of one discriminator, 1.39 at chance: 0.1 is 95 % certain of either. The generator's loss is then at least
# -log(1 - exp(-0.1)) = 2.35 by Jensen's inequality, so it is not checked too.
DISCRIMINATOR_WINS = 0.1
# A pillar is unused where replacing its output costs less than this (`probes.py`). 0.1 dB is 2.3 % of the squared error; a hundredth of a
# nat a token is 1 % in the probability of each; a ratio of 1.05 is 5 % of the squared error of the short films of validation.
UNUSED_DB, UNUSED_NATS, UNUSED_RATIO = 0.1, 0.01, 1.05
# dB by which reconstructions must beat the mean frame for these three to apply: what draws nothing has no use for any input.
DRAWS = 1.0
# Mean of an action in (-1, 1) over all imagined states: at 0.95 it is at its bound whatever is seen.
FROZEN = 0.95
# Values, as a multiple of what the largest reward in every step would give. 1.5 leaves room for one that was not imagined.
DIVERGES = 1.5
# One validation can be chance.
PATIENCE = 2


class Reading(NamedTuple):
    """What one check found: whether the threshold is crossed, and the numbers in words."""

    collapsed: bool
    words: str


@dataclass(frozen=True)
class Finding:
    """A collapse that begins or ends. `str()` is the line for the log."""

    name: str
    step: int
    begins: bool
    words: str
    remedy: str

    def __str__(self) -> str:
        name = self.name.replace("_", " ")
        if self.begins:
            return f"step {self.step} COLLAPSE, {name}: {self.words}. Remedy: {self.remedy}"
        return f"step {self.step} collapse over, {name}: {self.words}"


def dead_codebook(values: Mapping[str, float], **sizes: int) -> Reading | None:
    """Few codes of the tokenizer occur in the held-out frames."""
    if (usage := values.get("validation/code_usage")) is None:
        return None
    return Reading(usage < DEAD_CODEBOOK, f"{usage:.1%} of the codes occur in held-out frames (threshold {DEAD_CODEBOOK:.0%})")


def one_component(values: Mapping[str, float], *, max_components: int, **sizes: int) -> Reading | None:
    """The mixture weights, averaged over all frames, lie on one component. One component a frame, but different ones, is no collapse."""
    effective = values.get("validation/effective_components")
    if effective is None or max_components == 1:
        return None
    return Reading(
        effective < ONE_COMPONENT, f"{effective:.2f} effective components of {max_components} over all frames (threshold {ONE_COMPONENT})"
    )


def slots_alike(values: Mapping[str, float], **sizes: int) -> Reading | None:
    """All attention slots have the same map."""
    overlap = values.get("validation/slot_overlap", values.get("model/slot_overlap"))
    if overlap is None:
        return None
    return Reading(overlap > SLOTS_ALIKE, f"slot maps overlap by {overlap:.3f} on average (threshold {SLOTS_ALIKE})")


def kl_at_zero(values: Mapping[str, float], *, latent_dim: int, **sizes: int) -> Reading | None:
    """The posterior equals the prior: the latent carries no information about the frame."""
    if (kl := values.get("validation/loss/kl_z")) is None:
        return None
    each = kl / latent_dim
    return Reading(each < KL_AT_ZERO, f"KL_z is {kl:.3g} nats a frame, {each:.2g} for each latent dimension (threshold {KL_AT_ZERO})")


def discriminator_winning(values: Mapping[str, float], **sizes: int) -> Reading | None:
    """A discriminator separates decoded from real frames with certainty, so the generator learns nothing from it."""
    losses = {kind: values[name] for kind in ("image", "temporal") if (name := f"loss/discriminator_{kind}") in values}
    if not losses or values.get("loss/adversarial") == 0:  # 0: the adversarial task has not begun
        return None
    kind = min(losses, key=losses.__getitem__)
    words = f"the {kind} discriminator's loss is {losses[kind]:.3g} (threshold {DISCRIMINATOR_WINS}, chance 1.39)"
    if (generator := values.get("loss/generator")) is not None:
        words += f", the generator's {generator:.3g}"
    return Reading(losses[kind] < DISCRIMINATOR_WINS, words)


def _draws(values: Mapping[str, float]) -> bool:
    """Whether reconstructions show more than the mean frame."""
    return values.get("validation/psnr", -math.inf) - values.get("validation/psnr_mean_frame", math.inf) >= DRAWS


def attention_unused(values: Mapping[str, float], **sizes: int) -> Reading | None:
    """Reconstructions are as good with a uniform map: the decoder does not read the attention."""
    cost = values.get("validation/probe_attention_db")
    if cost is None or not _draws(values):
        return None
    return Reading(cost < UNUSED_DB, f"a uniform map costs reconstructions {cost:.3g} dB (threshold {UNUSED_DB})")


def context_unused(values: Mapping[str, float], **sizes: int) -> Reading | None:
    """Neither the next tokens nor the encoder's latents are worse with the context of another sequence."""
    nats, decibels = (values.get(f"validation/probe_context_{unit}") for unit in ("nats", "db"))
    if nats is None or decibels is None or not _draws(values):
        return None
    words = f"another sequence's context costs {nats:.3g} nats a token (threshold {UNUSED_NATS}) and {decibels:.3g} dB ({UNUSED_DB})"
    return Reading(nats < UNUSED_NATS and decibels < UNUSED_DB, words)


def actions_unused(values: Mapping[str, float], **sizes: int) -> Reading | None:
    """Predicted films are as good with the actions of another sequence."""
    ratio = values.get("validation/probe_action_shuffle_ratio")
    if ratio is None or not _draws(values):
        return None
    return Reading(ratio < UNUSED_RATIO, f"other actions multiply the error of films by {ratio:.3f} (threshold {UNUSED_RATIO})")


def policy_frozen(values: Mapping[str, float], **sizes: int) -> Reading | None:
    """An action is at its bound, whatever is seen."""
    if (bias := values.get("behaviour/action_bias")) is None:
        return None
    return Reading(bias > FROZEN, f"an action is {bias:.3f} of its bound on average over imagined states (threshold {FROZEN})")


def critic_diverging(values: Mapping[str, float], **sizes: int) -> Reading | None:
    """Values are larger than any rewards could make them."""
    value, limit = (values.get(f"behaviour/{name}") for name in ("value_size", "value_limit"))
    if value is None or not limit:
        return None
    words = f"values of {value:.3g}, the largest reward in every step gives {limit:.3g} (threshold {DIVERGES} times)"
    return Reading(value > DIVERGES * limit, words)


def reward_unknown(values: Mapping[str, float], **sizes: int) -> Reading | None:
    """The reward head is worse than the mean reward."""
    if (explained := values.get("validation/reward_explained")) is None:
        return None
    return Reading(explained < 0, f"the share of the variance of held-out rewards that is explained is {explained:.3f} (threshold 0)")


CHECKS: dict[str, tuple[Callable[..., Reading | None], str]] = {
    "dead_codebook": (
        dead_codebook,
        "lower --codebook-decay so that codes follow the encoder faster, raise --lambda-commitment, or take a smaller --codebook-size",
    ),
    "one_component": (
        one_component,
        "raise --entropy-weight, or --beta-warmup-epochs so that components separate before the KL has weight",
    ),
    "slots_alike": (slots_alike, "keep --enforce-diversity on, raise --slot-iterations, or take a smaller --num-attention-slots"),
    "kl_at_zero": (
        kl_at_zero,
        "raise --beta-warmup-epochs, lower --beta, or lower --likelihood-std so that details of a frame are worth their nats",
    ),
    "discriminator_winning": (
        discriminator_winning,
        "lower --discriminator-lr, raise --n-critic, or set --gradient-penalty 1, which --compile whole lacks",
    ),
    "attention_unused": (
        attention_unused,
        "lower --attention-dropout, which trains the decoder to do without the map, or lower --latent-dim so that z cannot hold all places",
    ),
    "context_unused": (
        context_unused,
        "train perception longer with --picture-steps, or raise --lambda-recall, or --hidden-tokens, so that present tokens tell less",
    ),
    "actions_unused": (
        actions_unused,
        "raise --lambda-overshoot or --overshoot-frames, train the recurrence longer with --latent-phase-updates, or collect data whose "
        "actions move things further (--policy mixed)",
    ),
    "policy_frozen": (policy_frozen, "raise --actor-entropy and --final-entropy, lower --actor-lr, or record more --seed-episodes"),
    "critic_diverging": (critic_diverging, "lower --discount or --critic-lr, or raise --critic-decay"),
    "reward_unknown": (reward_unknown, "raise --latent-updates or --lambda-outcome, or record episodes in which the reward varies"),
}


class Watch:
    """Reads every logged row and reports when a collapse begins and ends.

    Args:
        latent_dim, max_components: Z, K of the model.
        patience: validations in a row that must show a collapse.

    Example:
        >>> watch = Watch(latent_dim=18, max_components=8)
        >>> for finding in watch.look(step, row):
        ...     print(finding)
    """

    def __init__(self, latent_dim: int, max_components: int, patience: int = PATIENCE):
        self.patience = patience
        self._sizes = {"latent_dim": latent_dim, "max_components": max_components}
        self._latest: dict[str, float] = {}
        self._in_a_row = dict.fromkeys(CHECKS, 0)
        self._active = dict.fromkeys(CHECKS, False)
        self.readings: dict[str, Reading] = {}  # the last of each check that could be made

    def look(self, step: int, values: Mapping[str, Any]) -> list[Finding]:
        """The findings that begin or end with this row.

        Args:
            step: updates done.
            values: a row of `metrics.jsonl`, of training or of a validation. Checks are made at a validation, with what training
                logged last. None and numbers that are not finite are passed over.
        """
        self._latest |= {name: v for name, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        if not any(name.startswith("validation/") for name in values):
            return []
        findings = []
        for name, (check, remedy) in CHECKS.items():
            if (reading := check(self._latest, **self._sizes)) is None:
                continue
            self.readings[name] = reading
            self._in_a_row[name] = self._in_a_row[name] + 1 if reading.collapsed else 0
            active = reading.collapsed and (self._active[name] or self._in_a_row[name] >= self.patience)
            if active != self._active[name]:
                self._active[name] = active
                findings.append(Finding(name, step, active, reading.words, remedy))
        return findings

    def flags(self) -> dict[str, float]:
        """`collapse/<name>`: 1 while it lasts, 0 otherwise; only of checks that could be made."""
        return {f"collapse/{name}": float(self._active[name]) for name in self.readings}


def replay(watch: Watch, rows: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """All findings of a new `watch` in the rows of a `metrics.jsonl`; its state is then that of the run."""
    return [finding for row in rows for finding in watch.look(row["step"], row)]
