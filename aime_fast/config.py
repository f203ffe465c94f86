"""Every setting of a run: one dataclass a concern, one commented line a field, presets for the tiers of the specification.

Nothing changes a config after parsing. `preset(1)`, `preset(2)`, `preset(3)` and `preset("debug")` are whole, valid configs; the
command line starts from one of them and overrides single fields.

Legend of shapes for the whole repository:

    B batch of sequences    T frames a sequence    C, H, W image    A action width
    Z latent    Dh LSTM hidden    Dc context    K mixture components
    S slots     Ds slot width     Ha, Wa attention grid (H/8)    Ht, Wt token grid (H/8)
    Q quantiser heads    V codes a head
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from aime_fast.bounds import Bound, Count, Few, HeadedWidth, Layers, Length, OpenShare, Positive, Seed, Share, Steps, Weight, Width, check
from aime_fast.errors import ConfigError

Compile = Literal["off", "capture", "on", "graph", "whole"]  # ways to run an update, see `aime_fast.runtime.machine.WAYS`

NoiseKind = Literal["random", "ou", "swing", "mixed"]  # policies that see nothing, see `aime_fast.data.noise.NoisePolicy`
Backend = Literal["local", "distributed", "ray"]  # where the workers of a collection run, see `aime_fast.data.backends`

PICTURE_SHARE = 2 / 3  # of the steps, where `picture_steps` is None
LATENT_UPDATES = 10  # of the latent phase for each joint update, where `latent_phase_updates` is None

# Settings under the names that they had in the version before: still read from the command line.
RENAMED = {
    "dynamics_updates": "latent_phase_updates",
    "dynamics_batch_size": "latent_phase_batch_size",
    "dynamics_frames": "latent_phase_frames",
    "dynamics_learning_rate": "latent_phase_learning_rate",
    "lambda_att_dyn": "lambda_attention_motion",
}


@dataclass(frozen=True)
class DataConfig:
    """What is recorded and how batches are cut from it."""

    domain: str = "cartpole"  # dm_control domain
    task: str = "swingup"  # dm_control task
    data: str | None = None  # HDF5 file or folder of files, or several with wildcards: a.h5,b/*.h5; "synthetic"; none: collect first
    episodes: Count = 50  # episodes to collect (or to synthesise)
    frame_skip: Count = 4  # simulator steps for one agent step; one frame is rendered for each agent step
    image_size: Annotated[int, Bound(8, 1024)] = 64  # H = W, pixels
    camera: str = "0"  # of the task, by number or name; -1: one that shows the whole scene
    render_quality: Literal["fast", "full"] = "fast"  # fast: no anti-aliasing, shadows or reflections
    policy: NoiseKind = "ou"  # uniform noise, Ornstein-Uhlenbeck, sinusoids, random or swing by episode
    workers: Annotated[int, Bound(1, 256)] = 2  # collector processes
    validation_fraction: OpenShare = 0.1  # share of the episodes that validate (at least one)
    test_fraction: OpenShare = 0.1  # share of the episodes that are tested (at least one); nothing in training reads them
    split_seed: Seed = 0  # of the split into training, validation and test episodes
    sequence_length: Count = 10  # T
    batch_size: Count = 16  # B
    stills: Few = 0  # updates of encoder and decoder alone for each batch, on B T single frames of all episodes
    prefetch: Few = 2  # batches made ready ahead of the step
    replay: Literal["auto", "device", "host"] = "auto"  # unpacked frames; auto: on the GPU if a quarter of its free memory holds them
    augment: bool = True  # random zoom and shift, on the device
    max_shift: Annotated[float, Bound(0, 0.5)] = 0.06  # augmentation: largest shift, as a share of the image
    max_zoom: OpenShare = 0.06  # augmentation: largest zoom, as a share of the image


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the five pillars. Defaults are those of tiers 2 and 3."""

    latent_dim: Width = 36  # Z
    hidden_dim: Width = 512  # Dh
    context_dim: Width = 256  # Dc
    max_components: Annotated[int, Bound(2, 4096)] = 15  # K
    attention_dim: HeadedWidth = 64  # Ds
    num_attention_slots: Width = 5  # S
    slot_iterations: Layers = 3  # rounds of slot attention
    attention_fusion: Literal["weighted", "max", "gated"] = "weighted"  # how slot maps become one map
    attention_prior_dim: HeadedWidth = 64  # width of the top-down attention prior
    lstm_layers: Layers = 1  # layers of the recurrence
    num_latents: Width = 128  # Perceiver latent queries a frame
    num_latent_channels: HeadedWidth = 256  # width of a Perceiver latent
    context_layers: Layers = 2  # layers of the causal temporal transformer
    predictor_dim: HeadedWidth = 256  # width of the token predictor
    predictor_layers: Few = 4  # layers of the token predictor
    codebook_heads: Layers = 4  # Q
    codebook_size: Annotated[int, Bound(2, 1 << 20)] = 1024  # V
    code_dim: Width = 64  # width of one head's code
    share_codebook: bool = False  # one codebook for all heads
    codebook_decay: OpenShare = 0.99  # EMA decay of the codebook
    tokenizer_channels: Annotated[tuple[Width, ...], Length(2, 2)] = (128, 256)  # widths at H/4, H/8
    encoder_channels: Annotated[tuple[Width, ...], Length(3, 3)] = (128, 256, 256)  # widths at H/4, H/8, H/16; the decoder mirrors them
    blocks_per_level: Few = 1  # residual blocks at each resolution of the VAE towers
    dense_dim: Width = 512  # width of the dense layers at the narrow ends of the VAE towers
    discriminator_channels: Annotated[tuple[Width, ...], Length(1, 8)] = (128, 256)  # widths at H/4, H/8 and so on
    discriminator_dim: HeadedWidth = 128  # width of the temporal discriminator
    likelihood: Literal["gaussian", "mol"] = "gaussian"  # p(x | z, A): Gaussian, or mixture of discretised logistics
    likelihood_std: Positive = 0.1  # standard deviation of the Gaussian likelihood, pixels in [-1, 1]
    mol_components: Layers = 10  # logistics of the mixture likelihood
    prior_context: Literal["previous", "current"] = "previous"  # p(z_t | h_{t-1}, c_{t-1}) or c_t (sees the frame it predicts)
    kl: Literal["exact", "series10"] = "exact"  # KL(Kumaraswamy || Beta): exact, or AIME's ten terms
    token_corruption: Share = 0.1  # share of input tokens replaced by random codes when training the predictor
    hidden_tokens: Share = 0.5  # share of training sequences whose tokens are predicted from the context alone, so that it carries them
    attention_dropout: Share = 0.5  # share of training sequences decoded with a uniform map, so that z carries what is predicted
    overshoot_frames: Steps = 3  # imagined frames that are scored in training
    decoded_share: Share = 1.0  # share of training sequences that are decoded, at least the next; with --stills few are enough
    auxiliary_share: Share = 1.0  # share of training sequences that token tasks, discriminators and imagined frames see
    refinement_steps: Few = 0  # MaskGIT rounds for one frame of generated tokens; 0 samples all tokens at once


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms."""

    lambda_recon: Weight = 1.0  # reconstruction
    beta: Weight = 1.0  # KL of latents and mixture, after warm-up
    entropy_weight: Weight = 0.1  # entropy of the mixture weights
    lambda_gram: Weight = 0.0  # Gram distance to the EMA encoder; 0 saves that encoder's pass over the batch (docs/log.md has the measures)
    lambda_overshoot: Weight = 0.5  # scores of imagined frames
    lambda_outcome: Weight = 1.0  # cross-entropy of reward and continuation
    lambda_commitment: Weight = 0.25  # VQ commitment
    lambda_recall: Weight = 1.0  # error of latents and delta read linearly from the context
    lambda_attention_motion: Weight = 0.1  # attention motion
    lambda_attention_foreground: Weight = 0.0  # KL of the map to where the frame differs from the background; needs --no-augment
    lambda_kl_attention: Weight = 0.1  # KL between inferred and predicted attention, of observed and of imagined frames
    lambda_gan: Weight = 0.1  # generator GAN loss
    lambda_fm: Weight = 1.0  # feature matching
    enforce_diversity: bool = True  # overlap and entropy of slot maps


@dataclass(frozen=True)
class OptimConfig:
    """Adam, schedules, RGB and the discriminator step."""

    learning_rate: Annotated[float, Bound(0, 1)] = 2e-4  # Adam
    perceiver_lr_scale: Weight = 1.5  # the perceiver learns at learning_rate times this
    towers_lr_scale: Weight = 1.0  # encoder and decoder learn from sequences at learning_rate times this; single frames are not affected
    discriminator_lr: Annotated[float, Bound(0, 1)] = 2e-4  # Adam of the discriminators
    schedule: Literal["constant", "cosine"] = "constant"  # learning-rate schedule
    adam_beta1: OpenShare = 0.9  # Adam's momentum; RGB's consensus is a second one, so lower either this or the rate where RGB turns far
    adversarial_start_epochs: Weight = 2.0  # until then only the discriminators learn: RGB weighs an untrained one like any task
    lr_warmup_steps: Steps = 20  # updates over which the learning rate rises: Adam's first steps are all of full size
    grad_clip: Positive = 5.0  # global norm
    beta_warmup_epochs: Weight = 25.0  # beta rises from 0 over this many epochs; this and all that follow count from the first joint update
    overshoot_warmup_epochs: Weight = 3.0  # lambda_overshoot rises from 0 over this many epochs: reconstruction comes first
    own_tokens: Share = 0.5  # scheduled sampling: share of input frames whose tokens are the predictor's own, after warm-up
    own_tokens_warmup_epochs: Weight = 10.0  # that share rises from 0 over this many epochs
    ema_decay: OpenShare = 0.995  # EMA of the weights, every step
    n_critic: Count = 2  # generator steps for one discriminator step
    gradient_penalty: Weight = 0.0  # R1 penalty on real frames, 0 turns it off
    rgb_mu: Share = 0.9  # RGB: EMA of the consensus direction
    rgb_lambda: Weight = 1.0  # RGB: pull towards the original gradients
    rgb_alpha_steps: Few = 3  # RGB: gradient steps on the angles
    rgb_lr_inner: Weight = 0.2  # RGB: size of those steps
    aggregation: Literal["norm_weighted", "mean"] = "norm_weighted"  # RGB: sum |g_i| r_i (the texts) or mean r_i (AIME's code)
    picture_steps: Steps | None = 0  # first steps, of encoder, decoder and, every other one, perceiver; none: two thirds, with --stills
    latent_phase_updates: Steps | None = 0  # after the joint ones: of recurrence and priors alone; none: ten for each joint update
    latent_phase_batch_size: Count = 64  # pieces of episodes in such an update
    latent_phase_frames: Count = 30  # frames imagined in it, at first fewer, after some observed ones
    latent_phase_learning_rate: Annotated[float, Bound(0, 1)] = 3e-3  # of its Adam, falling as a cosine
    keep_best_latent_phase: bool = False  # keep its weights by which held-out roll-outs cost least in nats, not the last: for few episodes
    accumulate: Annotated[int, Bound(1, 4096)] = 1  # batches whose gradients make one update


@dataclass(frozen=True)
class RunConfig:
    """How long, where, and what is written."""

    seed: Seed = 0  # seed of data, weights and noise
    steps: Count | None = None  # updates, picture steps included; give this or --epochs
    epochs: Annotated[float, Bound(0, 1e6, open_low=True)] | None = None  # passes over the training sequences, picture steps included
    device: str = "auto"  # cpu, cuda, cuda:N or auto
    tf32: Literal["auto", "on", "off"] = "auto"  # TF32 in fp32 matrix products and convolutions on a GPU; auto: with bf16
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 runs the convolutions and matmuls under autocast
    messages: Literal["fp32", "bf16"] = "fp32"  # what several processes send gradients as; bf16 halves the bytes
    compile: Compile | Literal["best"] = "off"  # on: regions; whole: all; capture: a CUDA graph; graph: regions, captured; bare: best
    compile_cache: str | None = None  # file of compiled code, read if it is there and written at the end: a job array compiles once
    kernels: Literal["auto", "reference", "triton"] | None = None  # auto: Triton on CUDA, references elsewhere; none: AIME_KERNELS, or auto
    threads: Annotated[int, Bound(1, 1024)] | None = None  # CPU threads; none: all
    run_dir: str | None = None  # everything a run leaves behind; none: runs/<domain>-<task>-tier<tier>-seed<seed>[-<hash>]
    resume: bool = False  # go on from the newest checkpoint in run_dir
    logger: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)  # JSONL is always written
    log_every: Steps = 10  # steps between log lines
    validate_every: Steps = 200  # steps between validations
    validation_batches: Count = 4  # batches of a validation
    sample_every: Steps = 200  # steps between sample pictures
    checkpoint_every: Steps = 1000  # steps between checkpoints; one more is saved at the first log line
    checkpoint_minutes: Annotated[float, Bound(0, 1e6)] = 10.0  # minutes between checkpoints, at most; 0: no such limit
    keep_checkpoints: Count = 3  # how many of the newest checkpoints stay
    on_nan: Literal["stop", "skip"] = "stop"  # a non-finite loss or gradient stops the run, or the update is skipped


@dataclass(frozen=True)
class ControlConfig:
    """Online training (`--online`): when the environment is stepped and how much is learnt from it; actor and critic."""

    online: bool = False  # collect with the policy, learn the world model, learn to act in what it imagines, and again
    environment_frames: Count = 100_000  # simulator steps in all; an agent step is --frame-skip of them
    seed_episodes: Annotated[int, Bound(3, 1_000_000)] = 10  # episodes of --policy before anything is learnt
    cycle_episodes: Count = 4  # episodes that the actor then plays between updates
    plays_beside: bool = False  # a second process plays the next cycle's episodes while this one learns, by the policy of the cycle before
    train_ratio: Positive = 6.0  # frames of sequences that updates of the world model replay, for each new frame of an agent step
    seed_train_ratio: Positive = 10.0  # the same for the seed episodes
    latent_updates: Weight = 4.0  # updates of the latent phase for each of those
    policy_updates: Weight = 13.0  # updates of actor and critic for each of those
    replay_frames: Count = 1_000_000  # agent steps to train on, at most; the oldest training episodes are deleted
    average_decay: OpenShare = 0.98  # of the weights' average that infers and acts, in place of --ema-decay: it must follow what is new
    imagination_starts: Count = 64  # states that an update of actor and critic imagines from, in pieces of 8
    imagination_horizon: Count = 15  # actions imagined from each; as many frames does the latent phase imagine
    discount: OpenShare = 0.99  # of a reward one agent step later
    return_decay: Share = 0.95  # lambda of the returns
    actor_entropy: Weight = 3e-2  # weight of the actor's entropy, beside returns divided by their range, in the first half of the run
    final_entropy: Weight | None = None  # the same at its end, which it approaches in the second half; none: it stays
    actor_lr: Annotated[float, Bound(0, 1)] = 3e-4  # Adam
    actor_decay: OpenShare = 0.998  # of the actor's average, which is scored: a few cycles
    critic_lr: Annotated[float, Bound(0, 1)] = 1e-3  # Adam
    critic_decay: OpenShare = 0.95  # of the critic's average, which completes returns
    policy_dim: Width = 256  # width of actor and critic
    return_episodes: Count = 10  # episodes played at the end without noise


@dataclass(frozen=True)
class Config:
    """A whole run."""

    tier: str = "2"  # the preset this config started from
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    run: RunConfig = field(default_factory=RunConfig)


# Tier 1 keeps the specification's Z, Dh, K, T and B and shrinks every width it leaves open, so that two CPU cores suffice.
TIER_1 = Config(
    tier="1",
    data=DataConfig(augment=False, stills=2),  # a thousand updates are too few to learn invariance to a moving background
    model=ModelConfig(
        latent_dim=18, hidden_dim=256, context_dim=32, max_components=8, attention_prior_dim=32,
        attention_dim=32, num_latents=8, num_latent_channels=64, context_layers=2, predictor_dim=64, predictor_layers=2,
        codebook_size=256, code_dim=16,
        tokenizer_channels=(32, 32), encoder_channels=(48, 64, 96), blocks_per_level=0, dense_dim=256,
        discriminator_channels=(32, 64), discriminator_dim=64, decoded_share=0.25, auxiliary_share=0.25, attention_dropout=0.3,
    ),
    loss=LossConfig(lambda_attention_foreground=1.0),
    # Short runs: a high rate, and RGB close to the original gradients. At lambda 1 every gradient turned by 50 degrees towards a moving
    # average of unit vectors, and the latent collapsed before the decoder had learnt to use it.
    optim=OptimConfig(learning_rate=1e-3, rgb_lambda=10.0, beta_warmup_epochs=2.0, picture_steps=None, latent_phase_updates=None),
    run=RunConfig(epochs=50),
)  # fmt: skip

TIER_2 = Config(
    tier="2",
    data=DataConfig(domain="reacher", task="easy", image_size=84, sequence_length=20, batch_size=32, episodes=200),
    model=ModelConfig(auxiliary_share=0.25),
    run=RunConfig(epochs=200, precision="bf16"),
)

TIER_3 = Config(
    tier="3",
    data=DataConfig(domain="humanoid", task="walk", image_size=84, sequence_length=50, batch_size=8, episodes=500, frame_skip=2),
    model=ModelConfig(auxiliary_share=0.25),
    optim=OptimConfig(accumulate=4),  # 4 x 8 sequences: the specification's batch of 32
    run=RunConfig(epochs=500, precision="bf16"),
)

# Every dimension small and most of them different, so that a mixed-up axis shows.
DEBUG = Config(
    tier="debug",
    data=DataConfig(
        episodes=4, image_size=32, sequence_length=5, batch_size=2, stills=2, frame_skip=8, workers=1, validation_fraction=0.25
    ),
    model=ModelConfig(
        latent_dim=6, hidden_dim=24, context_dim=20, max_components=4, attention_dim=16, num_attention_slots=3, attention_prior_dim=16,
        num_latents=4, num_latent_channels=16, context_layers=1, predictor_dim=32, predictor_layers=1,
        codebook_heads=2, codebook_size=32, code_dim=8,
        tokenizer_channels=(8, 16), encoder_channels=(8, 16, 16), blocks_per_level=1,
        discriminator_channels=(8, 16), discriminator_dim=16, mol_components=3, decoded_share=0.5, auxiliary_share=0.5,
    ),
    run=RunConfig(steps=4, log_every=1, validate_every=2, sample_every=2, checkpoint_every=2, validation_batches=1),
)  # fmt: skip

PRESETS: dict[str, Config] = {"1": TIER_1, "2": TIER_2, "3": TIER_3, "debug": DEBUG}


def preset(tier: int | str) -> Config:
    """The config of a tier: 1, 2, 3 or "debug". Raises ConfigError for any other name."""
    try:
        return PRESETS[str(tier)]
    except KeyError:
        raise ConfigError(f"--tier {tier}: there is no such tier; choose one of {', '.join(PRESETS)}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dictionaries, ready for YAML."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. Raises ConfigError naming a bad field."""

    def build(cls: type, section: dict[str, Any], where: str):
        if unknown := sorted(set(section) - {f.name for f in dataclasses.fields(cls)}):
            raise ConfigError(f"config: {where or 'top level'} has no field {', '.join(unknown)}; was it written by another version?")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in section.items()})

    sections: dict[str, type] = {
        "data": DataConfig, "model": ModelConfig, "loss": LossConfig, "optim": OptimConfig, "control": ControlConfig, "run": RunConfig
    }  # fmt: skip
    built = {name: build(sections[name], v, name) if name in sections else v for name, v in values.items()}
    config = build(Config, built, "")
    check(config)
    return config
