"""DPGMMVariationalRecurrentAutoencoder: the five pillars joined.

`forward_sequence` is the time-parallel path of training: everything but the LSTM runs over B*T frames at once. `step` is the
definition, one frame at a time. The two agree to rounding (tests/test_world_model.py).

One frame, in order (docs/architecture.md shows it):

    tokens_t = tokenizer(x_{<=t});  c_t = context(tokens_{<=t});  z_t ~ q(z | x_t, c_t), with mean m_t
    p(z_t | h_{t-1}, c_{t-1}, m_{t-1}, m_{t-2});  h_t = LSTM(h_{t-1}, [m_t, 5 (m_t - m_{t-1}), c_t, a_t])
    A_t = posterior(x_t, h_t, c_t), predicted by prior(A_{t-1}, h_{t-1}, m_{t-1});  x_hat_t = decoder(z_t, A_t)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.attention_schema import AttentionSchema
from aime_fast.attention_schema.schema import LOG_FLOOR, attention_kl, foreground, map_entropy, slot_overlap
from aime_fast.bounds import check
from aime_fast.config import Compile, Config, ModelConfig
from aime_fast.control.heads import OutcomeHeads
from aime_fast.encoder_decoder import ImageDiscriminator, TemporalDiscriminator, VAEDecoder, VAEEncoder
from aime_fast.encoder_decoder import discriminators as gan
from aime_fast.generative_prior import DPGMMPrior
from aime_fast.generative_prior.dpgmm_prior import prior_noise
from aime_fast.imagination import frame as one_frame
from aime_fast.imagination.frame import State
from aime_fast.imagination.overshooting import pixel_overshooting
from aime_fast.imagination.sequence import Inference, predict_latents, sample_latents
from aime_fast.layers import emphasise_last, full_precision, previous, starts, to_frames
from aime_fast.multi_task_learning import losses
from aime_fast.multi_task_learning.loss_aggregator import OUTCOMES
from aime_fast.perceiver_io import CausalPerceiverIO
from aime_fast.perceiver_io.context import PerceptionCache
from aime_fast.perceiver_io.tokenizer import Tokens
from aime_fast.runtime import ranks, streams
from aime_fast.runtime.roll_out import RollOut, match_layout
from aime_fast.runtime.spans import span
from aime_fast.temporal_dynamics import LSTMLayer


def seen_sequences(batch: int, share: float) -> int:
    """How many sequences of a batch a dear task sees in training, that has a share of them: at least one."""
    return max(1, round(share * batch))


class DPGMMVariationalRecurrentAutoencoder(nn.Module):
    """AIME's world model.

    Args:
        image_size: H = W in pixels.
        action_dim: A.
        sequence_length: T, the window of attention over time.
        sizes: fields of `aime_fast.config.ModelConfig`, which has their defaults: `max_components`, `latent_dim`, `hidden_dim`,
            `context_dim`, `attention_dim`, `num_attention_slots` (K, Z, Dh, Dc, Ds, S) and others.

    Frames are float [-1, 1] or uint8 `[B, T, 3, H, W]`; actions `[B, T, A]`; `is_init` bool `[B, T]` or `[B, T, 1]`.
    """

    def __init__(self, *, image_size: int = 64, action_dim: int = 6, sequence_length: int = 16, **sizes: Any):
        super().__init__()
        c = ModelConfig(**sizes)
        check(c)
        self.image_size, self.action_dim, self.latent_dim = image_size, action_dim, c.latent_dim
        self.prior_context, self.overshoot_frames, self.attention_dropout = c.prior_context, c.overshoot_frames, c.attention_dropout
        self.auxiliary_share, self.decoded_share = c.auxiliary_share, max(c.decoded_share, c.auxiliary_share)
        self.perceiver_io = CausalPerceiverIO(
            (sequence_length, 3, image_size, image_size), c.num_latents, c.num_latent_channels, 2 * c.num_latent_channels, c.context_dim,
            action_dim, c.latent_dim, c.context_layers,
            tokenizer=dict(
                channels=c.tokenizer_channels, codebook_heads=c.codebook_heads, codebook_size=c.codebook_size, code_dim=c.code_dim,
                share_codebook=c.share_codebook, codebook_decay=c.codebook_decay,
            ),
            predictor=dict(
                dim=c.predictor_dim, layers=c.predictor_layers, corruption=c.token_corruption, hidden_share=c.hidden_tokens,
                refinement_steps=c.refinement_steps,
            ),
        )  # fmt: skip
        self.encoder = VAEEncoder(image_size, c.latent_dim, c.context_dim, c.encoder_channels, c.blocks_per_level, c.dense_dim)
        self.decoder = VAEDecoder(
            image_size, c.latent_dim, c.encoder_channels, c.blocks_per_level, c.dense_dim, c.likelihood, c.likelihood_std, c.mol_components
        )
        self.prior = DPGMMPrior(c.hidden_dim, c.context_dim, c.latent_dim, c.max_components, c.kl)
        self.recurrence = LSTMLayer(2 * c.latent_dim + c.context_dim + action_dim, c.hidden_dim, c.lstm_layers)
        emphasise_last(self.recurrence.input_gates[0], action_dim)
        self.attention = AttentionSchema(
            image_size, c.hidden_dim, c.context_dim, c.latent_dim, c.attention_dim, c.num_attention_slots, c.slot_iterations,
            c.attention_fusion, c.attention_prior_dim,
        )  # fmt: skip
        self.outcomes = OutcomeHeads(c.hidden_dim, c.latent_dim)
        self.image_discriminator = ImageDiscriminator(c.discriminator_channels)
        self.temporal_discriminator = TemporalDiscriminator(image_size, c.latent_dim, c.discriminator_dim, max_frames=sequence_length)
        self.roll_out = RollOut(one_frame.imagine)
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, config: Config, action_dim: int) -> DPGMMVariationalRecurrentAutoencoder:
        """The model of a whole `Config`, for a task with `action_dim` actions."""
        data = config.data
        return cls(
            image_size=data.image_size, action_dim=action_dim, sequence_length=data.sequence_length, **dataclasses.asdict(config.model)
        )

    def discriminator_parameters(self) -> list[nn.Parameter]:
        """Parameters of both discriminators."""
        return [*self.image_discriminator.parameters(), *self.temporal_discriminator.parameters()]

    def generator_parameters(self) -> list[nn.Parameter]:
        """All other parameters: those the four tasks share."""
        discriminators = {id(p) for p in self.discriminator_parameters()}
        return [p for p in self.parameters() if id(p) not in discriminators]

    def get_share_params(self) -> Iterator[nn.Parameter]:
        """The parameters RGB works on, under LibMTL's name."""
        return iter(self.generator_parameters())

    def initialise_background(self, mean_frame: Tensor) -> None:
        """Sets the encoder's background to the mean training frame, float [3, H, W] in [-1, 1], and starts the decoder's there."""
        with torch.no_grad():
            for tower in (self.encoder, self.decoder):
                tower.background.copy_(mean_frame)

    def regions(self) -> dict[str, nn.Module]:
        """The modules that are compiled, by name: those of many small operators.

        The recurrence is none: as one graph its loop is unrolled, at 50 frames 3,600 operators that take longer to lower than all regions
        together, and PyTorch has a fused cell for a GPU (docs/performance.md).
        """
        modulations = {f"attention modulation {i}": region for i, region in enumerate(self.decoder.modulations)}
        return {"mixture prior": self.prior, "slot attention": self.attention.posterior.slot_attention} | modulations

    def compile_regions(self, backend_of: Callable[[str], str | Callable] = lambda name: "inductor") -> None:
        """`torch.compile`, in place, of the `regions`, each with the backend of its name.

        Inductor does not beat oneDNN and MKL on convolutions and transformers (docs/performance.md). Several backward passes go through
        one compiled forward, so donated buffers are off.
        """
        torch._functorch.config.donated_buffer = False
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # frames of a batch, and of a roll-out
        for name, region in self.regions().items():
            region.compile(dynamic=False, backend=backend_of(name))

    def compile_imagination(self, mode: Compile = "on") -> None:
        """How `predict_future` and token generation run a frame, see `RollOut`."""
        self.roll_out = RollOut(one_frame.imagine, mode)
        self.perceiver_io.compile_generation(mode)

    def infer_and_score(
        self,
        observations: Tensor,
        actions: Tensor,
        is_init: Tensor | None = None,
        ema: DPGMMVariationalRecurrentAutoencoder | None = None,
        own_tokens: Tensor | float = 0.0,
        ahead: bool = False,
        brought: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Infers, reconstructs and scores a batch of sequences, in parallel over time.

        In training, `decoded_share` of the sequences are decoded, and `auxiliary_share` tokenised back, imagined on and discriminated.

        Args:
            observations: [B, T, 3, H, W], uint8 or float in [-1, 1].
            actions: [B, T, A]; a_t is taken after seeing x_t.
            is_init: bool [B, T] or [B, T, 1]; the state is empty before these frames and before frame 0.
            ema: the EMA copy of this model, whose encoder anchors the Gram term; without it the term is 0.
            own_tokens: in training, share of frames whose tokens are replaced, as the predictor's input, by its own prediction of them.
            ahead: perception begins where the side stream "perceiver" was forked, see `runtime.streams.beside`.
            brought: reward and discount of each action, [B, T] or [B, T, 1] each; without them the terms of `outcomes` are 0.

        Returns:
            reconstructions [B or less, T, 3, H, W], latents, posterior_mean, posterior_logvar [B, T, Z], mixture_weights [B, T, K],
            component_means, component_logvars [B, T, K, Z], hidden [B, T, Dh], context [B, T, Dc], slot_maps [B, T, S, Ha, Wa],
            drawn [B or less, T, 3, H, W] (for the discriminators, always with the map),
            attention, attention_prior [B, T, Ha, Wa], movement [B, T, 2, Ha, Wa], tokens [B, T, Ht, Wt, Q], and scalars: every name of
            `loss_aggregator.TERMS` (recon, KLs and entropy in nats a frame), perplexity, code_usage, token_accuracy, slot_overlap.
            All in a dictionary: in compiled code Dynamo would guard TensorDict's global state and recompile.

        Raises:
            ValueError: a shape does not fit the model.
        """
        video = self._frames(observations, check=False)
        self._check_actions(actions, *video.shape[:2])
        start = starts(is_init, *video.shape[:2], video.device)
        tokens, context = streams.beside("perceiver", self._perceive, video, is_init, self.training, ahead=ahead)()
        inferred = self._infer(video, context, actions, start)
        q, p = inferred.posterior, inferred.prior
        few, drawn = self.few(len(start)), self._share(len(start), self.decoded_share)
        seen, seen_video, seen_start = inferred.rows(few, start.shape), video[few], start[few]
        attended = streams.beside("attention", self._score_attention, inferred, video, start)
        with span("encoder_decoder: decoder"):
            z, maps = (x.unflatten(0, start.shape)[drawn].flatten(0, 1) for x in (inferred.latents, inferred.maps.attention))
            decoded = self.decoder(z, self.with_dropout(maps, start[drawn].shape))
        pictures = None
        if self.training:
            parameters = decoded.detach().unflatten(0, start[drawn].shape)[few]
            pictures = self.decoder.likelihood.mean(parameters.flatten(0, 1)).unflatten(0, start[few].shape)
        means, delta = (x.unflatten(0, start.shape) for x in (q.mean, inferred.delta))
        if self.training:
            self.perceiver_io.learn_context(inferred.context)
        imagined = streams.beside("imagination", self._imagine, seen, seen_video, actions[few], seen_start)
        perceived = streams.beside(
            "perceiver", self.perceiver_io.score,
            video, tokens, inferred.context, actions, start, few, means, delta, own_tokens, pictures,
        )  # fmt: skip
        judged = streams.beside("adversary", self._judge, seen, seen_video, seen_start, decoded)
        terms = dict(perplexity=tokens.perplexity, code_usage=tokens.usage)
        with span("encoder_decoder: likelihood"):
            terms["recon"] = self.decoder.likelihood.nll(decoded, video[drawn].flatten(0, 1)).mean()
        with span("generative_prior: KL"):
            z = inferred.latents if self.training else sample_latents(q.mean, q.logvar, True)
            terms["kl_z"] = losses.kl_monte_carlo(z, q.mean, q.logvar, p.log_weights, p.means, p.logvars).mean()
            terms["kl_hierarchical"] = p.kl_hierarchical.mean()
            terms["mixture_entropy"] = losses.categorical_entropy(p.log_weights).mean()
        with span("control: outcomes"):
            terms |= self._score_outcomes(inferred.hidden, means.detach(), brought)
        with span("encoder_decoder: Gram"):
            terms["gram"] = self._gram(q.features, video, ema)
        out = inferred._replace(decoded=decoded).describe(tokens.codes, self.decoder.likelihood, start.shape)
        out["drawn"], adversarial = judged()
        return out | terms | perceived() | imagined() | attended() | adversarial

    def _score_outcomes(self, hidden: Tensor, latents: Tensor, brought: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        """Means over actions, in nats, of h [B, T, Dh] and latents [B, T, Z]; `brought` as for `infer_and_score`."""
        if brought is None:
            return dict.fromkeys(OUTCOMES, hidden.new_zeros((), dtype=full_precision(hidden).dtype))
        scores = self.outcomes.score(hidden, latents, *(x.reshape(hidden.shape[:2]) for x in brought))
        return {name: score.mean() for name, score in zip(OUTCOMES, scores)}

    def _score_attention(self, inferred: Inference, video: Tensor, start: Tensor) -> dict[str, Tensor]:
        """The terms of the predictive task, of observed frames."""
        with span("attention_schema: losses"):
            maps, overlap = inferred.maps, slot_overlap(inferred.maps.slot_maps)
            in_time = (maps.attention, inferred.attention_before, inferred.predicted.movement)
            seen_there = foreground(video.flatten(0, 1), self.decoder.background, self.attention.grid)
            return dict(
                kl_attention=attention_kl(maps.attention, inferred.predicted.log_attention).mean(),
                attention_motion=self.attention.motion_loss(*(m.unflatten(0, start.shape) for m in in_time), start),
                attention_foreground=attention_kl(seen_there, (maps.attention + LOG_FLOOR).log()).mean(),
                slot_overlap=overlap, diversity=overlap + map_entropy(maps.slot_maps),
            )  # fmt: skip

    def _imagine(self, seen: Inference, video: Tensor, actions: Tensor, start: Tensor) -> dict[str, Tensor]:
        with span("temporal_dynamics: overshooting"):
            return pixel_overshooting(self, seen, video, actions, start, self.overshoot_frames)

    def _judge(self, seen: Inference, video: Tensor, start: Tensor, decoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(frames for the discriminators [B, T, 3, H, W], the terms of the adversarial task)."""
        with span("encoder_decoder: adversarial"):
            z, fake = seen.latents.detach(), decoded
            if self.training:  # decoded anew: with gradient to the decoder alone, and always with the map
                fake = self.decoder(z, seen.maps.attention.detach())
            fake, z = (x.unflatten(0, start.shape) for x in (self.decoder.likelihood.mean(fake), z))
            return fake, gan.generator_learns(self.image_discriminator, self.temporal_discriminator, fake, video, z)

    def few(self, batch: int) -> slice:
        """The sequences of a batch that the tasks of `auxiliary_share` see."""
        return self._share(batch, self.auxiliary_share)

    def _share(self, batch: int, share: float) -> slice:
        """The sequences of a batch that a dear task sees: in training a share of them, at least one of all ranks'; else all."""
        return slice(seen_sequences(batch * ranks.size(), share) // ranks.size() if self.training else batch)

    def forward_sequence(self, observations: Tensor, *arguments: Any, **options: Any) -> TensorDict:
        """`infer_and_score`, with the same arguments, as a TensorDict without batch size. Raises ValueError for pixels out of range too."""
        return TensorDict(self.infer_and_score(self._frames(observations), *arguments, **options), batch_size=[])

    forward = forward_sequence

    def _perceive(self, video: Tensor, is_init: Tensor | None, learn: bool = False) -> tuple[Tokens, Tensor]:
        """(tokens, context [B, T, Dc]). See `VQPTTokenizer.tokenize` for `learn`."""
        start = starts(is_init, *video.shape[:2], video.device)
        with span("perceiver_io: tokenizer"):
            tokens = self.perceiver_io.tokenizer.tokenize(video, start, learn=learn)
        with span("perceiver_io: context"):
            return tokens, self.perceiver_io.context(tokens.codes, start)

    def _infer(self, video: Tensor, context: Tensor, actions: Tensor, start: Tensor, decode: bool = False) -> Inference:
        """Everything but perception and losses; only the recurrence in `predict_latents` is sequential."""
        shape, flat = start.shape, video.flatten(0, 1)
        with span("encoder_decoder: encoder"):
            posterior = self.encoder(flat, context.flatten(0, 1))
            latents = sample_latents(*(x.unflatten(0, shape) for x in (posterior.mean, posterior.logvar)), self.training).flatten(0, 1)
        means = posterior.mean.unflatten(0, shape)
        delta, hidden, lstm, hidden_before, latents_before, prior = predict_latents(self, means, context, actions, start, self.training)

        with span("attention_schema: posterior"):
            # Awaited at once; it is the backward pass that runs beside others.
            maps = streams.beside("attention", self.attention.posterior, flat, hidden.flatten(0, 1), context.flatten(0, 1))()
        with span("attention_schema: prior"):
            attention_before = previous(maps.attention.unflatten(0, shape), start, self.attention.uniform(1)).flatten(0, 1)
            # Without gradient, as h and z: else maps learn to be where the next one is easy to predict.
            predicted = streams.beside("attention", self.attention.prior, attention_before.detach(), hidden_before, latents_before)()
        with span("encoder_decoder: decoder"):
            decoded = self.decoder(latents, self.with_dropout(maps.attention, shape)) if decode else None
        delta = delta.flatten(0, 1)
        return Inference(posterior, latents, delta, prior, context, hidden, lstm, maps, attention_before, predicted, decoded)

    def with_dropout(self, attention: Tensor, shape: torch.Size) -> Tensor:
        """Attention dropout: in training, uniform maps [B * T, Ha, Wa] for a share of the sequences; shape is (B, T). `step` has none.

        A map is inferred from the frame at no KL cost: a decoder that always had it would decode from it what only z can predict.
        """
        if not self.training or self.attention_dropout == 0:
            return attention
        dropped = ranks.rand(shape[0], 1, device=attention.device) < self.attention_dropout
        return torch.where(dropped.expand(shape).reshape(-1, 1, 1), self.attention.uniform(1).to(attention.dtype), attention)

    def discriminator_loss(
        self, outputs: Mapping[str, Tensor], observations: Tensor, gradient_penalty: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of both discriminators on the frames and reconstructions of a batch, which get no gradient.

        Args: outputs of `forward_sequence`; observations as given to it; gradient_penalty weighs the R1 penalty on real frames.

        Returns: (scalar, scalars by name).
        """
        few = self.few(len(observations))
        real = self._frames(observations, check=False)[few]
        fake, z = outputs["drawn"].detach(), outputs["latents"].detach()[few]
        return gan.discriminators_learn(self.image_discriminator, self.temporal_discriminator, fake, real, z, gradient_penalty)

    def _gram(self, features: Tensor, video: Tensor, ema: DPGMMVariationalRecurrentAutoencoder | None) -> Tensor:
        if ema is None:
            return features.new_zeros((), dtype=full_precision(features).dtype)
        with torch.no_grad():
            anchor = ema.encoder.features(video.flatten(0, 1))
        return losses.gram_distance(features, anchor)

    def initial_state(self, batch: int) -> State:
        """The empty state before a first frame."""
        return one_frame.initial_state(self, batch)

    def step(self, observation: Tensor, action: Tensor, state: State, is_init: Tensor | None = None) -> tuple[TensorDict, State]:
        """One frame, with the posterior: the definition of the model.

        Args: observation [B, 3, H, W]; action [B, A], taken after it; state of the frame before; is_init bool [B].

        Returns: (TensorDict with the per-frame keys of `forward_sequence` without the T axis, the next state).
        """
        frame = self._frames(observation.unsqueeze(1))
        batch = frame.shape[0]
        self._check_actions(action.unsqueeze(1), batch, 1)
        init = torch.zeros(batch, dtype=torch.bool, device=frame.device) if is_init is None else is_init.reshape(batch).bool()
        out, state = one_frame.step(self, frame[:, 0], action, state, init)
        return TensorDict(out, batch_size=[batch]), state

    def imagine(self, action: Tensor, state: State, sample: bool = False) -> tuple[TensorDict, State]:
        """One frame without observing it; see `imagination.frame.imagine`.

        Args: action [B, A], taken after the imagined frame; state of the frame before.

        Returns: (TensorDict: reconstructions [B, 3, H, W], latents [B, Z], mixture_weights [B, K], attention [B, Ha, Wa], rewards and
        continues [B]; next state).
        """
        out, state = one_frame.imagine(self, action, state, sample)
        return TensorDict(out, batch_size=[action.shape[0]]), state

    @torch.no_grad()
    def reconstruct(self, observations: Tensor, actions: Tensor) -> Tensor:
        """[B, T, 3, H, W] and [B, T, A] -> reconstructions [B, T, 3, H, W]."""
        return self.decoder.likelihood.mean(self.infer(observations, actions, decode=True).decoded).unflatten(0, actions.shape[:2])

    @torch.no_grad()
    def infer(self, observations: Tensor, actions: Tensor, decode: bool = False, context: Tensor | None = None) -> Inference:
        """`Inference` about the frames [B, T, 3, H, W] of whole sequences with their actions [B, T, A].

        Args: decode: with their pictures; context: [B, T, Dc], instead of the one that perception infers.
        """
        video = self._frames(observations)
        self._check_actions(actions, *video.shape[:2])
        start = starts(None, *video.shape[:2], video.device)
        return self._infer(video, self._perceive(video, None)[1] if context is None else context, actions, start, decode)

    @torch.no_grad()
    def encode(self, observations: Tensor) -> TensorDict:
        """Posterior of each frame: posterior_mean, posterior_logvar [B, T, Z], context [B, T, Dc], tokens [B, T, Ht, Wt, Q]."""
        video = self._frames(observations)
        tokens, context = self._perceive(video, None)
        q = self.encoder(video.flatten(0, 1), context.flatten(0, 1))
        mean, logvar = (x.unflatten(0, video.shape[:2]) for x in (q.mean, q.logvar))
        out = dict(posterior_mean=mean, posterior_logvar=logvar, context=context, tokens=tokens.codes)
        return TensorDict(out, batch_size=video.shape[:2])

    @torch.no_grad()
    def extract_context(self, observations: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> c [B, T, Dc]."""
        return self.perceiver_io.extract_context(self._frames(observations))

    @torch.no_grad()
    def predict_future(
        self, observations: Tensor, actions: Tensor, future_actions: Tensor, sample: bool = False, seeds: Sequence[int] | None = None
    ) -> TensorDict:
        """Open-loop prediction.

        Args:
            observations: [B, Tc, 3, H, W], the observed frames.
            actions: [B, Tc, A], taken after each of them.
            future_actions: [B, F, A]; future_actions[:, i] is taken after predicted frame i, so frame i depends on those before i.
            sample: sample the priors; otherwise take the mean of the likeliest component.
            seeds: of a sample, one a row: a row's sample does not depend on the others. None draws from the default generator.

        Returns:
            TensorDict [B, F]: reconstructions [B, F, 3, H, W], latents [B, F, Z], mixture_weights [B, F, K], attention [B, F, Ha, Wa],
            rewards and continues [B, F], of each of `future_actions`.

        Raises:
            ValueError: a shape does not fit, or there is no frame to start from.
        """
        video = self._frames(observations)
        batch, observed = video.shape[:2]
        if observed == 0:
            raise ValueError("predict_future: observations hold no frame, expected at least one frame of context")
        self._check_actions(actions, batch, observed)
        self._check_actions(future_actions, batch, future_actions.shape[1])
        if future_actions.shape[1] == 0:
            raise ValueError("predict_future: future_actions are empty, expected one action for each frame to predict")
        start, perceiver = starts(None, batch, observed, video.device), self.perceiver_io
        tokens, context = self._perceive(video, None)
        inferred = self._infer(video, context, actions, start)
        _, context_cache = perceiver.extend_context(tokens.codes, perceiver.empty_cache(batch).context)
        state = one_frame.state_after(inferred, lambda x: x[:, -1], PerceptionCache(tokens.cache, context_cache))
        given: Any = future_actions
        if sample and seeds is not None:
            given = (
                future_actions,
                prior_noise(seeds, future_actions.shape[1], self.prior.components, self.latent_dim, self.decoder.background),
            )
        out, _ = self.roll_out(self, given, match_layout(state, self.initial_state(batch)), sample)
        return TensorDict(out, batch_size=future_actions.shape[:2])

    def _frames(self, observations: Tensor, check: bool = True) -> Tensor:
        """uint8 or float frames [B, T, 3, H, W] -> float in [-1, 1], of the model's precision; see `to_frames`."""
        expected = (3, self.image_size, self.image_size)
        if observations.dim() != 5 or tuple(observations.shape[2:]) != expected:
            raise ValueError(f"observations have shape {tuple(observations.shape)}, expected [B, T, {', '.join(map(str, expected))}]")
        return to_frames(observations, self.decoder.background.dtype, check)

    def _check_actions(self, actions: Tensor, batch: int, frames: int) -> None:
        expected = (batch, frames, self.action_dim)
        if tuple(actions.shape) != expected:
            raise ValueError(f"actions have shape {tuple(actions.shape)}, expected {expected}: [B, T, A], one action for each frame")
