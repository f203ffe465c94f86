"""Train AIME on a task: `python -m aime_fast.train [--tier N] [--data PATH] [--domain D --task T --seed S] ...`.

Exit status: 0 done; 2 wrong settings, data or files; 3 a loss, gradient or weight is not finite; 130 after Ctrl-C, 143 after SIGTERM, 129
after SIGHUP or a closed terminal, 141 when nobody reads the output any more; 1 a fault of the program, whose traceback is in a file.
"""

from __future__ import annotations

from collections.abc import Sequence

from aime_fast.cli import parse_config, run_command
from aime_fast.config import Config
from aime_fast.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Parse a config, train, say where everything is."""
    config = parse_config("python -m aime_fast.train", "Train AIME. Without --data the tier's data is collected first.", argv)
    from aime_fast.evaluate import EvaluateConfig, evaluate
    from aime_fast.report import ReportConfig, report
    from aime_fast.runtime import ranks
    from aime_fast.training import OnlineTrainer

    if config.control.online and ranks.launched():
        raise ConfigError("--online plays and learns in one process; start it without a launcher")
    if config.control.online:
        result = OnlineTrainer(config).train()
        print(f"\nrun         {result['run_dir']}\ncheckpoint  {result['checkpoint']}")
        evaluate(EvaluateConfig(str(result["run_dir"]), returns=True, episodes=config.control.return_episodes, device=config.run.device))
    elif (result := train_as_launched(config)) is None:
        return
    else:
        print_result(result)
    report(ReportConfig(str(result["run_dir"]), device=config.run.device))


def train_as_launched(config: Config) -> dict | None:
    """Trains, alone or as one of the processes that a launcher started; None where another one of them leads."""
    from aime_fast.runtime import ranks
    from aime_fast.runtime.machine import choose_device
    from aime_fast.training import DMCVBTrainer

    with ranks.joined(choose_device(ranks.local_device(config.run.device)), config.run.messages):
        result = DMCVBTrainer(config).train()
        return result if ranks.leads() else None


def print_result(result: dict) -> None:
    """The last validation as a table, and the paths of a finished run."""
    width = max(map(len, result["validation"]))
    print(f"\nheld-out episodes after step {result['step']}, averaged weights:")
    for name, value in result["validation"].items():
        print(f"  {name:<{width}}  {value:10.4f}")
    print(f"\nrun         {result['run_dir']}\ncheckpoint  {result['checkpoint']}\nvideo       {result['video']}")


if __name__ == "__main__":
    run_command(main)
