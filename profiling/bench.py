"""Measure: `python -m profiling.bench WHAT [OPTION ...]`, see `BENCHES`; each has a --help of its own."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each is a module `profiling.bench_NAME` with `add_options(parser)` and `bench(options, usage_error) -> exit status`. It is imported only
# when it is chosen, so that a machine with little but PyTorch can measure the kernels.
BENCHES = {
    "kernels": "each kernel against eager PyTorch, torch.compile and the best public peer",
    "train": "the training step by tier, precision, kernels and compile mode",
    "imagine": "imagined steps in latent space, ours and TorchRL's RSSM",
    "distributed": "one update by several processes",
    "data": "the loader, with prefetch and without",
    "learning": "what ours and a peer learn in the same processor time",
    "control": "what ours and a peer learn to do in the same processor time",
    "pillars": "what each pillar is worth, by runs without it",
    "collect": "recording episodes of a dm_control task",
    "convert": "converting another program's episodes: speed and memory",
    "codecs": "ways of compressing recorded pictures",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options and run one benchmark; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    choices = "\n".join(f"  {name:<11} {text}" for name, text in BENCHES.items())
    chooser = argparse.ArgumentParser(
        prog="python -m profiling.bench",
        description=f"Measure. WHAT is one of\n\n{choices}\n\nand takes options of its own: WHAT --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chooser.add_argument("what", choices=tuple(BENCHES), metavar="WHAT")
    what = chooser.parse_args(arguments[:1]).what
    try:
        module = importlib.import_module(f"profiling.bench_{what}")
    except ModuleNotFoundError as error:
        chooser.error(f"{what}: {error}; install it, or choose another bench")
    parser = argparse.ArgumentParser(
        prog=f"python -m profiling.bench {what}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_options(parser)
    return module.bench(parser.parse_args(arguments[1:]), parser.error)


if __name__ == "__main__":
    sys.exit(main())
