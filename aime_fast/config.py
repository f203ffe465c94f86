"""Every setting of a run: one dataclass a concern, one commented line a field, presets for the tiers of the specification.

Nothing changes a config after parsing. `preset(1)`, `preset(2)`, `preset(3)` and `preset("debug")` are whole, valid configs; the
command line starts from one of them and overrides single fields.

Legend of shapes for the whole repository:

    B batch of sequences    T frames a sequence    C, H, W image    A action width
    Z latent    Dh LSTM hidden    Dc context    K mixture components
    S slots     Ds slot width     Ha, Wa attention grid (H/4)    Ht, Wt token grid (H/8)
    Q quantiser heads    V codes a head
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

# Settings under the names that they had in the version before: still read from the command line and from old checkpoints.
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
    data: str | None = None  # HDF5 file or folder of files; "synthetic" needs no simulator; none: collect first
    episodes: int = 50  # episodes to collect (or to synthesise)
    frame_skip: int = 4  # simulator steps for one agent step; one frame is rendered for each agent step
    image_size: int = 64  # H = W, pixels
    render_quality: Literal["fast", "full"] = "fast"  # fast: no anti-aliasing, shadows or reflections
    policy: Literal["random", "ou", "swing", "mixed"] = "ou"  # uniform noise, Ornstein-Uhlenbeck, sinusoids, random or swing by episode
    workers: int = 2  # collector processes
    validation_fraction: float = 0.1  # share of the episodes held out (at least one)
    sequence_length: int = 10  # T
    batch_size: int = 16  # B
    prefetch: int = 2  # batches made ready ahead of the step
    replay: Literal["auto", "device", "host"] = "auto"  # unpacked frames; auto: on the GPU if a quarter of its free memory holds them
    augment: bool = True  # random zoom and shift, on the device
    max_shift: float = 0.06  # augmentation: largest shift, as a share of the image
    max_zoom: float = 0.06  # augmentation: largest zoom, as a share of the image


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the five pillars. Defaults are those of tiers 2 and 3."""

    latent_dim: int = 36  # Z
    hidden_dim: int = 512  # Dh
    context_dim: int = 256  # Dc
    max_components: int = 15  # K
    attention_dim: int = 64  # Ds
    num_attention_slots: int = 5  # S
    slot_iterations: int = 3  # rounds of slot attention
    attention_fusion: Literal["weighted", "max", "gated"] = "weighted"  # how slot maps become one map
    attention_prior_dim: int = 64  # width of the top-down attention prior
    lstm_layers: int = 1  # layers of the recurrence
    num_latents: int = 128  # Perceiver latent queries a frame
    num_latent_channels: int = 256  # width of a Perceiver latent
    context_layers: int = 2  # layers of the causal temporal transformer
    predictor_dim: int = 256  # width of the token predictor
    predictor_layers: int = 4  # layers of the token predictor
    codebook_heads: int = 4  # Q
    codebook_size: int = 1024  # V
    code_dim: int = 64  # width of one head's code
    share_codebook: bool = False  # one codebook for all heads
    codebook_decay: float = 0.99  # EMA decay of the codebook
    tokenizer_channels: tuple[int, ...] = (64, 128, 256)  # widths at H/2, H/4, H/8
    encoder_channels: tuple[int, ...] = (64, 128, 256, 256)  # widths at H/2, H/4, H/8, H/16; the decoder mirrors them
    blocks_per_level: int = 2  # residual blocks at each resolution of the VAE towers
    discriminator_channels: tuple[int, ...] = (64, 128, 256)  # widths at H/2, H/4, H/8
    discriminator_dim: int = 128  # width of the temporal discriminator
    likelihood: Literal["gaussian", "mol"] = "gaussian"  # p(x | z, A): Gaussian, or mixture of discretised logistics
    likelihood_std: float = 0.1  # standard deviation of the Gaussian likelihood, pixels in [-1, 1]
    mol_components: int = 10  # logistics of the mixture likelihood
    prior_context: Literal["previous", "current"] = "previous"  # p(z_t | h_{t-1}, c_{t-1}) or c_t (sees the frame it predicts)
    kl: Literal["exact", "series10"] = "exact"  # KL(Kumaraswamy || Beta): exact, or AIME's ten terms
    token_corruption: float = 0.1  # share of input tokens replaced by random codes when training the predictor
    attention_dropout: float = 0.5  # share of training sequences decoded without their attention: z must hold what is predicted
    overshoot_frames: int = 5  # imagined frames that are scored in training
    refinement_steps: int = 0  # MaskGIT rounds for one frame of generated tokens; 0 samples all tokens at once


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms."""

    lambda_recon: float = 1.0  # reconstruction
    beta: float = 1.0  # KL terms, after warm-up
    entropy_weight: float = 0.1  # entropy of the mixture weights
    lambda_gram: float = 0.05  # Gram distance to the EMA encoder
    lambda_overshoot: float = 0.5  # scores of imagined frames
    lambda_commitment: float = 0.25  # VQ commitment
    lambda_attention_motion: float = 0.1  # attention motion
    lambda_gan: float = 0.1  # generator GAN loss
    lambda_fm: float = 1.0  # feature matching
    enforce_diversity: bool = True  # overlap and entropy of slot maps


@dataclass(frozen=True)
class OptimConfig:
    """Adam, schedules, RGB and the discriminator step."""

    learning_rate: float = 2e-4  # Adam
    perceiver_lr_scale: float = 1.5  # the perceiver learns at learning_rate times this
    discriminator_lr: float = 2e-4  # Adam of the discriminators
    schedule: Literal["constant", "cosine"] = "constant"  # learning-rate schedule
    adam_beta1: float = 0.9  # Adam's momentum; RGB's consensus is a second one, so lower either this or the rate where RGB turns far
    adversarial_start_epochs: float = 2.0  # until then only the discriminators learn: RGB would give a noisy critic an equal vote
    lr_warmup_steps: int = 20  # updates over which the learning rate rises: Adam's first steps are all of full size
    grad_clip: float = 5.0  # global norm
    beta_warmup_epochs: float = 25.0  # beta rises from 0 over this many epochs
    overshoot_warmup_epochs: float = 3.0  # lambda_overshoot rises from 0 over this many epochs: reconstruction comes first
    own_tokens: float = 0.5  # scheduled sampling: share of input frames whose tokens are the predictor's own, after warm-up
    own_tokens_warmup_epochs: float = 10.0  # that share rises from 0 over this many epochs
    ema_decay: float = 0.995  # EMA of the weights, every step
    n_critic: int = 2  # generator steps for one discriminator step
    gradient_penalty: float = 0.0  # R1 penalty on real frames, 0 turns it off
    rgb_mu: float = 0.9  # RGB: EMA of the consensus direction
    rgb_lambda: float = 1.0  # RGB: pull towards the original gradients
    rgb_alpha_steps: int = 3  # RGB: gradient steps on the angles
    rgb_lr_inner: float = 0.2  # RGB: size of those steps
    aggregation: Literal["norm_weighted", "mean"] = "norm_weighted"  # RGB: sum |g_i| r_i (the texts) or mean r_i (AIME's code)
    latent_phase_updates: int = 0  # after the joint updates: updates of recurrence and priors alone, on latents inferred once
    latent_phase_batch_size: int = 32  # sequences of such an update
    latent_phase_frames: int = 15  # frames imagined in it, after up to 8 observed ones
    latent_phase_learning_rate: float = 1e-3  # of its Adam, falling as a cosine
    accumulate: int = 1  # batches whose gradients make one update


@dataclass(frozen=True)
class RunConfig:
    """How long, where, and what is written."""

    seed: int = 0  # seed of data, weights and noise
    steps: int | None = None  # generator updates; give this or --epochs
    epochs: float | None = None  # passes over the training sequences
    device: str = "auto"  # cpu, cuda, cuda:N or auto
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 runs the convolutions and matmuls under autocast
    compile: Literal["off", "on", "graph", "best"] = "off"  # torch.compile; graph: and one CUDA graph; bare: best for the device
    kernels: Literal["auto", "reference", "triton"] | None = None  # auto: Triton on CUDA, references elsewhere; none: AIME_KERNELS, or auto
    threads: int | None = None  # CPU threads; none: all
    run_dir: str | None = None  # everything a run leaves behind; none: runs/<domain>-<task>-tier<tier>-seed<seed>
    resume: bool = False  # go on from the newest checkpoint in run_dir
    logger: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)  # JSONL is always written
    log_every: int = 10  # steps between log lines
    validate_every: int = 200  # steps between validations
    validation_batches: int = 4  # batches of a validation
    sample_every: int = 200  # steps between sample pictures
    checkpoint_every: int = 1000  # steps between checkpoints
    keep_checkpoints: int = 3  # how many of the newest checkpoints stay
    on_nan: Literal["stop", "skip"] = "stop"  # a non-finite loss or gradient stops the run, or the update is skipped


@dataclass(frozen=True)
class Config:
    """A whole run."""

    tier: str = "2"  # the preset this config started from
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


# Tier 1 keeps the specification's Z, Dh, K, T and B and shrinks every width it leaves open, so that two CPU cores suffice.
TIER_1 = Config(
    tier="1",
    data=DataConfig(augment=False),  # a thousand updates are too few to learn invariance to a moving background
    model=ModelConfig(
        latent_dim=18, hidden_dim=256, context_dim=128, max_components=8, attention_prior_dim=32,
        num_latents=16, num_latent_channels=128, context_layers=2, predictor_dim=128, predictor_layers=2, codebook_size=256,
        tokenizer_channels=(16, 32, 64), encoder_channels=(24, 32, 64, 64), blocks_per_level=1,
        discriminator_channels=(16, 32, 64), discriminator_dim=64,
    ),
    # Short runs: a high rate, and RGB close to the original gradients. At lambda 1 every gradient turned by 50 degrees towards a moving
    # average of unit vectors, and the latent collapsed before the decoder had learnt to use it.
    optim=OptimConfig(learning_rate=1e-3, rgb_lambda=10.0, latent_phase_updates=1000),
    run=RunConfig(epochs=50),
)  # fmt: skip

TIER_2 = Config(
    tier="2",
    data=DataConfig(domain="reacher", task="easy", image_size=84, sequence_length=20, batch_size=32, episodes=200),
    run=RunConfig(epochs=200, precision="bf16"),
)

TIER_3 = Config(
    tier="3",
    data=DataConfig(domain="humanoid", task="walk", image_size=84, sequence_length=50, batch_size=8, episodes=500, frame_skip=2),
    optim=OptimConfig(accumulate=4),  # 4 x 8 sequences: the specification's batch of 32
    run=RunConfig(epochs=500, precision="bf16"),
)

# Every dimension small and most of them different, so that a mixed-up axis shows.
DEBUG = Config(
    tier="debug",
    data=DataConfig(episodes=4, image_size=32, sequence_length=5, batch_size=2, frame_skip=8, workers=1, validation_fraction=0.25),
    model=ModelConfig(
        latent_dim=6, hidden_dim=24, context_dim=20, max_components=4, attention_dim=16, num_attention_slots=3, attention_prior_dim=16,
        num_latents=4, num_latent_channels=16, context_layers=1, predictor_dim=32, predictor_layers=1,
        codebook_heads=2, codebook_size=32, code_dim=8,
        tokenizer_channels=(8, 8, 16), encoder_channels=(8, 8, 16, 16), blocks_per_level=1,
        discriminator_channels=(8, 8, 16), discriminator_dim=16, mol_components=3,
    ),
    run=RunConfig(steps=4, log_every=1, validate_every=2, sample_every=2, checkpoint_every=2, validation_batches=1),
)  # fmt: skip

PRESETS: dict[str, Config] = {"1": TIER_1, "2": TIER_2, "3": TIER_3, "debug": DEBUG}


def preset(tier: int | str) -> Config:
    """The config of a tier: 1, 2, 3 or "debug". Raises ValueError for any other name."""
    try:
        return PRESETS[str(tier)]
    except KeyError:
        raise ValueError(f"--tier {tier}: there is no such tier; choose one of {', '.join(PRESETS)}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dictionaries, ready for YAML."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; fields may have the names of `RENAMED`. Raises ValueError naming any field that is unknown."""

    def build(cls: type, section: dict[str, Any], where: str):
        section = {RENAMED.get(name, name): value for name, value in section.items()}
        if unknown := sorted(set(section) - {f.name for f in dataclasses.fields(cls)}):
            raise ValueError(f"config: {where or 'top level'} has no field {', '.join(unknown)}; was it written by another version?")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in section.items()})

    sections = {"data": DataConfig, "model": ModelConfig, "loss": LossConfig, "optim": OptimConfig, "run": RunConfig}
    built = {name: build(sections[name], v, name) if name in sections else v for name, v in values.items()}
    return build(Config, built, "")
