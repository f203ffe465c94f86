"""What each pillar is worth: a trained model with one input of one pillar replaced, against the model as it is.

An attention map is replaced by the uniform one, context and actions by those of a sequence of another episode, the mixture by its likeliest
component. Where the replacement costs nothing, nothing downstream reads that pillar, however good its own loss looks. Ablation at the
input of a trained model is the permutation importance of Breiman 2001 (Random Forests, section 10), with one permutation: it tells what
the model uses, not what a model trained without the pillar would reach.

A row is {"intact", "replaced", "cost", "unit"}; a cost above 0 says that the pillar helps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.data import normalise
from aime_fast.evaluation.clips import Clips
from aime_fast.evaluation.films import GAIN_STEPS
from aime_fast.evaluation.measures import psnr, squared_error
from aime_fast.evaluation.sums import Sums
from aime_fast.imagination.frame import State, state_after
from aime_fast.imagination.sequence import predict_latents
from aime_fast.layers import starts
from aime_fast.multi_task_learning.losses import kl_monte_carlo, mixture_log_prob
from aime_fast.runtime.roll_out import match_layout

NEAR = 1 / 8  # of the picture's side: a map whose centre of mass is within it of a point is near that point; 8 pixels of 64

# What validation logs: the costs of these rows.
LOGGED = {
    "probe_attention_db": "attention_in_reconstruction",
    "probe_context_db": "context_in_reconstruction",
    "probe_context_nats": "context_in_tokens",
    "probe_actions_nats": "actions_in_tokens",
    "probe_actions_prior_nats": "actions_in_prior",
    "probe_mixture_nats": "mixture_in_kl",
}

Row = dict[str, float | str | None]


def row(intact: float, replaced: float | None, unit: str) -> Row:
    """One line of the table. Nats are better when low, dB and shares when high; `replaced` is None where there was nothing to take."""
    sign = 1 if unit == "nats" else -1
    return {"intact": intact, "replaced": replaced, "cost": None if replaced is None else sign * (replaced - intact), "unit": unit}


class SequenceProbes:
    """Probes on sequences of the trained length, added to `sums`.

    In every batch context and actions are exchanged with those of the sequence `shift` rows before.
    """

    def __init__(self, sums: Sums | None = None):
        self.sums = sums or Sums()

    def update(
        self, model: nn.Module, video: Tensor, actions: Tensor, start: Tensor, outputs: Mapping[str, Tensor], shift: int = 1, seed: int = 0
    ) -> None:
        """Add a batch.

        Args: model in eval mode; video [B, T, 3, H, W] in [-1, 1]; actions [B, T, A]; start bool [B, T], see `layers.starts`; outputs of
        `forward_sequence` on them; seed of the sample at which the KL is taken.
        """
        frames, context = video.flatten(0, 1), outputs["context"]
        mean, attention = (outputs[name].flatten(0, 1) for name in ("posterior_mean", "attention"))
        uniform = model.attention.uniform(1).to(attention).expand_as(attention)
        other_context, other_actions = context.roll(shift, 0), actions.roll(shift, 0)
        confused = model.encoder(frames, other_context.flatten(0, 1)).mean
        weight = len(video)
        self.sums.add("error", squared_error(outputs["reconstructions"], video).double().mean() * weight)
        self.sums.add("error_uniform", squared_error(_decode(model, mean, uniform), frames).double().mean() * weight)
        self.sums.add("error_other_context", squared_error(_decode(model, confused, attention), frames).double().mean() * weight)

        deviation = (context - context.mean(0)).float().square().mean()
        self.sums.add("context_spread", (deviation / context.float().square().mean().clamp_min(1e-30)).sqrt() * weight)
        maps = attention.float().flatten(1)
        self.sums.add("map_nats", (maps * (maps * maps.shape[1]).clamp_min(1e-30).log()).sum(1).mean() * weight)

        predictor, tokens = model.perceiver_io.predictor, outputs["tokens"]
        self.sums.add("nats", outputs["next_token"] * weight)
        self.sums.add("accuracy", outputs["token_accuracy"] * weight)
        for name, given in (("other_context", (other_context, actions)), ("other_actions", (context, other_actions))):
            nats, accuracy = predictor.loss(tokens, *given, start)
            self.sums.add(f"nats_{name}", nats * weight)
            self.sums.add(f"accuracy_{name}", accuracy * weight)

        later = ~start.flatten()
        weights, means, logvars = (
            outputs[name].flatten(0, 1).float() for name in ("mixture_weights", "component_means", "component_logvars")
        )
        log_weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
        share = weight / later.sum().clamp_min(1)
        own = mixture_log_prob(mean.float(), log_weights, means, logvars)
        other = predict_latents(model, outputs["posterior_mean"], context, other_actions, start, sample=False).prior
        alike = other.log_weights.exp().float().clamp_min(torch.finfo(weights.dtype).tiny).log()  # rounded as those of the outputs
        other = mixture_log_prob(mean.float(), alike, other.means.float(), other.logvars.float())
        self.sums.add("prior", -(own * later).sum() * share)
        self.sums.add("prior_other_actions", -(other * later).sum() * share)

        logvar = outputs["posterior_logvar"].flatten(0, 1).float()
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(logvar)  # validation's own draws stay the same
        z = mean.float() + noise * (0.5 * logvar).exp()
        alone = torch.full_like(log_weights, -torch.inf).scatter(1, log_weights.argmax(1, keepdim=True), 0.0)
        self.sums.add("kl", kl_monte_carlo(z, mean.float(), logvar, log_weights, means, logvars).mean() * weight)
        self.sums.add("kl_alone", kl_monte_carlo(z, mean.float(), logvar, alone, means, logvars).mean() * weight)
        self.sums.add("sequences", weight)

    def compute(self, exchanged: bool = True) -> dict[str, Row]:
        """The rows; without `exchanged`, where there is no other sequence, those that exchange have no value.

        Two rows have nothing replaced, and tell a pillar that is not read from one that has nothing to tell: `attention_from_uniform`, the
        KL of the inferred map from the uniform one, and `context_spread`, the root mean square deviation of contexts from the mean
        over sequences at the same time, as a share of their root mean square.

        Raises ValueError where there was no batch.
        """
        if "sequences" not in self.sums:
            raise ValueError("probes: the held-out episodes give no sequence; lower --sequence-length")
        m = {name: float(self.sums[name] / self.sums["sequences"]) for name in self.sums}
        other = {name: value if exchanged else None for name, value in m.items() if "other" in name}
        context_error = other["error_other_context"]
        return {
            "attention_in_reconstruction": row(psnr(m["error"]), psnr(m["error_uniform"]), "dB"),
            "context_in_reconstruction": row(psnr(m["error"]), None if context_error is None else psnr(context_error), "dB"),
            "context_in_tokens": row(m["nats"], other["nats_other_context"], "nats"),
            "context_in_token_accuracy": row(m["accuracy"], other["accuracy_other_context"], "share"),
            "actions_in_tokens": row(m["nats"], other["nats_other_actions"], "nats"),
            "actions_in_token_accuracy": row(m["accuracy"], other["accuracy_other_actions"], "share"),
            "actions_in_prior": row(m["prior"], other["prior_other_actions"], "nats"),
            "mixture_in_kl": row(m["kl"], m["kl_alone"], "nats"),
            "attention_from_uniform": row(m["map_nats"], None, "nats"),
            "context_spread": row(m["context_spread"], None, "share"),
        }


def _decode(model: nn.Module, latents: Tensor, attention: Tensor) -> Tensor:
    """[N, Z], [N, Ha, Wa] -> pictures [N, 3, H, W]."""
    return model.decoder.likelihood.mean(model.decoder(latents, attention))


def interleave(episodes: Sequence[TensorDict], frames: int, batch: int) -> Iterator[TensorDict]:
    """Batches [B, frames] in which each sequence follows one of another episode, also the first one, which follows the last.

    Episodes are cut into sequences side by side, as many of each as of the shortest one. B is below twice `batch`, or 3.
    """
    count = min((len(episode) // frames for episode in episodes), default=0)
    groups = max(1, len(episodes) // max(2, batch))  # of at least two episodes, where there are two
    for several in (episodes[i::groups] for i in range(groups)):
        columns = max(1, batch // len(several))
        for first in range(0, count, columns):
            places = range(first, min(first + columns, count))
            yield torch.stack([episode[i * frames : (i + 1) * frames] for i in places for episode in several])


@torch.no_grad()
def probe_sequences(
    model: nn.Module, episodes: Sequence[TensorDict], frames: int, device: torch.device, batch: int = 16, seed: int = 0
) -> dict[str, Row]:
    """`SequenceProbes` on whole episodes, and where attention lies.

    Args: model in eval mode; episodes on the host, with `pixels`, `action`, `is_init` and, where known, `positions` [T, n, 2]; frames of a
    sequence.

    Returns: the rows of `SequenceProbes`; where there are positions, `attention_near_points`: the share of frames in which the centre of
    mass of the inferred map is near a point that is inside the picture, beside that of the uniform map.
    """
    probes, near, seen = SequenceProbes(), torch.zeros(2, dtype=torch.float64), 0
    for number, part in enumerate(interleave(episodes, frames, batch)):
        part = part.to(device)
        video = normalise(part["pixels"]).to(model.decoder.background.dtype)
        start = starts(part["is_init"], *video.shape[:2], device)
        actions = part["action"].to(video.dtype)
        outputs = model.forward_sequence(video, actions, part["is_init"])
        probes.update(model, video, actions, start, outputs, seed=seed + number)
        if (positions := part.get("positions", None)) is not None:
            uniform = model.attention.uniform(1).to(video.dtype).expand_as(outputs["attention"])
            maps = torch.stack([outputs["attention"], uniform])  # [2, B, T, Ha, Wa]
            near += _near_points(model.attention.centre(maps), positions, video.shape[-1]).double().cpu()
            seen += start.numel()
    rows = probes.compute(exchanged=len(episodes) > 1)
    if seen:
        intact, replaced = (near / seen).tolist()
        rows["attention_near_points"] = row(intact, replaced, "share")
    return rows


def _near_points(centres: Tensor, positions: Tensor, size: int) -> Tensor:
    """In how many frames a centre [M, B, T, 2] (x, y as shares of the side) is near one of the visible points [B, T, n, 2]: [M]."""
    inside = ((positions > -0.5) & (positions < size - 0.5)).all(-1)  # [B, T, n]
    distance = (centres.float().unsqueeze(-2) * size - 0.5 - positions).norm(dim=-1)  # [M, B, T, n]
    return ((distance <= NEAR * size) & inside).any(-1).sum((1, 2))


@torch.no_grad()
def probe_films(model: nn.Module, clips: Clips, device: torch.device, batch: int = 16) -> dict[str, Row]:
    """Rows of predicted films, mean PSNR of steps 5 to 16: the uniform map in every frame; the context of another clip in all observed
    frames; the actions of another clip. Empty where the horizon is shorter.

    Another clip is half the list away; where all clips are of one episode those rows have no value.
    """
    c, last = clips.context, GAIN_STEPS[-1]
    if clips.horizon < last:
        return {}
    pixels, actions, shift = clips.pixels[:, : c + last], clips.actions[:, : c + last], max(1, len(clips) // 2)
    other_pixels, other_actions = pixels[:, :c].roll(shift, 0), actions.roll(shift, 0)
    errors: dict[str, list[Tensor]] = {}
    for first in range(0, len(clips), batch):
        video, others, acted, others_acted = (x[first : first + batch].to(device) for x in (pixels, other_pixels, actions, other_actions))
        observed, future = (video[:, :c], acted[:, :c]), acted[:, c:]
        state = _observe(model, *observed)
        intact = _roll_out(model, state, future)
        latents, maps = (intact[name].flatten(0, 1) for name in ("latents", "attention"))
        uniform = model.attention.uniform(1).to(maps).expand_as(maps)
        films = {
            "intact": intact["reconstructions"],
            "attention": _decode(model, latents, uniform).unflatten(0, (len(video), last)),
            "context": _roll_out(model, _observe(model, *observed, model.extract_context(others)), future)["reconstructions"],
            "actions": _roll_out(model, state, others_acted[:, c:])["reconstructions"],
        }
        for name, film in films.items():
            errors.setdefault(name, []).append(squared_error(film, normalise(video[:, c:])).cpu())
    decibels = {
        name: sum(psnr(error) for error in torch.cat(parts).double().mean(0)[GAIN_STEPS[0] - 1 :].tolist()) / len(GAIN_STEPS)
        for name, parts in errors.items()
    }
    exchanged = len(clips.episodes.unique()) > 1
    return {
        f"{name}_in_films": row(decibels["intact"], decibels[name] if name == "attention" or exchanged else None, "dB")
        for name in ("attention", "context", "actions")
    }


def _observe(model: nn.Module, pixels: Tensor, actions: Tensor, context: Tensor | None = None) -> State:
    """The state after the observed frames, from which films are rolled out; no further frame will be observed."""
    return state_after(model.infer(pixels, actions, context=context), lambda x: x[:, -1])


def _roll_out(model: nn.Module, state: State, actions: Tensor) -> Mapping[str, Tensor]:
    """What `predict_future` does after its observed frames: outputs [B, F, ...]."""
    empty = model.initial_state(len(actions))
    return model.roll_out(model, actions, match_layout(state._replace(cache=empty.cache), empty), False)[0]


class ValidationProbes:
    """The cheap part, for the few batches of a validation: costs of `SequenceProbes`, and a short `action_shuffle_ratio`.

    Context and actions are exchanged with those of the sequence half a batch away, which may be of the same episode.
    """

    def __init__(self):
        self.sums = Sums()
        self._sequences = SequenceProbes(self.sums)

    def update(
        self, model: nn.Module, video: Tensor, actions: Tensor, is_init: Tensor, outputs: Mapping[str, Tensor], seed: int = 0
    ) -> None:
        """Add a batch, as `SequenceProbes.update` with `is_init` bool [B, T] or [B, T, 1]. One with a single sequence, or frame, has no
        other to exchange with and is passed over."""
        batch, frames = video.shape[:2]
        if min(batch, frames) < 2:
            return
        start = starts(is_init, batch, frames, video.device)
        self._sequences.update(model, video, actions, start, outputs, shift=batch // 2, seed=seed)
        half = slice(None, None, 2 if batch > 3 else 1)  # films cost as much as all other probes
        own, shuffled = shuffled_actions_errors(model, video[half], actions[half])
        self.sums.add("film_error", own)
        self.sums.add("film_error_shuffled", shuffled)

    def compute(self) -> dict[str, float]:
        """`probe_<pillar>_<unit>`: costs of a replaced input; `probe_attention_from_uniform`, `probe_context_spread`, see
        `SequenceProbes.compute`; `probe_action_shuffle_ratio`. Empty where no batch was probed."""
        if "film_error" not in self.sums:
            return {}
        rows = self._sequences.compute()
        own, shuffled = (float(self.sums[name]) for name in ("film_error", "film_error_shuffled"))
        signals = {f"probe_{name}": rows[name]["intact"] for name in ("attention_from_uniform", "context_spread")}
        costs = {name: rows[source]["cost"] for name, source in LOGGED.items()}
        return costs | signals | {"probe_action_shuffle_ratio": shuffled / own if own > 0 else 1.0}


@torch.no_grad()
def shuffled_actions_errors(model: nn.Module, video: Tensor, actions: Tensor) -> Tensor:
    """Squared errors [2] of films of the second half of the sequences, predicted with their own actions and with those half a batch away.

    Args: video [B, T, 3, H, W] in [-1, 1], T and B at least 2; actions [B, T, A].
    """
    half = video.shape[1] // 2
    observed, acted = (x[:, :half].repeat(2, *(1,) * (x.dim() - 1)) for x in (video, actions))
    future = torch.cat([actions[:, half:], actions[:, half:].roll(len(actions) // 2, 0)])
    film = model.predict_future(observed, acted, future)["reconstructions"].unflatten(0, (2, len(video)))
    return squared_error(film, video[:, half:]).mean((1, 2))
