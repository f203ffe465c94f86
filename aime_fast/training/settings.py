"""What a config leaves open: how long to train, where to write, where the data are; and what it may not ask for."""

from __future__ import annotations

from pathlib import Path

from aime_fast.config import Config, OptimConfig, preset
from aime_fast.errors import ConfigError


def training_length(config: Config) -> dict[str, float | None]:
    """`{"steps": N, "epochs": None}` or the reverse.

    Where both are set, one of them comes from the tier's preset and the other overrides it. Raises ConfigError if both differ
    from the preset, if neither is set, or if the one that counts is not positive.
    """
    steps, epochs, usual = config.run.steps, config.run.epochs, preset(config.tier).run
    if steps is not None and epochs is not None:
        if steps != usual.steps and epochs != usual.epochs:
            raise ConfigError(f"--steps {steps} and --epochs {epochs:g} both say how long to train; give one of them")
        steps, epochs = (steps, None) if steps != usual.steps else (None, epochs)
    if steps is None and epochs is None:
        raise ConfigError("how long to train is not said; give --steps or --epochs")
    name, value = ("steps", steps) if steps is not None else ("epochs", epochs)
    if value <= 0:
        raise ConfigError(f"--{name} {value:g}: expected more than 0")
    return {"steps": steps, "epochs": epochs}


def default_run_dir(config: Config) -> Path:
    """`runs/<domain>-<task>-tier<tier>-seed<seed>`."""
    return Path("runs") / f"{config.data.domain}-{config.data.task}-tier{config.tier}-seed{config.run.seed}"


def data_file(config: Config) -> Path:
    """Where the data of these settings are stored without --data, named after the settings that change a frame.

    The number of workers, which changes how seeds are dealt out, is not in the name: name two such recordings with --data.
    """
    d, seed = config.data, config.run.seed
    name = f"{d.domain}-{d.task}-{d.image_size}px-skip{d.frame_skip}-{d.render_quality}-{d.policy}-{d.episodes}ep-seed{seed}.h5"
    return Path("data") / name


def check_latent_phase(optim: OptimConfig) -> None:
    """Raises ConfigError for a latent phase that no data can serve."""
    for name, least in (("updates", 0), ("batch_size", 1), ("frames", 1), ("learning_rate", 0)):
        if (value := getattr(optim, f"latent_phase_{name}")) < least:
            raise ConfigError(f"--latent-phase-{name.replace('_', '-')} {value}: at least {least} is needed")
