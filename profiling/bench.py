"""Measure speed: `python -m profiling.bench kernels [--kernel NAME ...] [--device cpu|cuda] [--quick] [--json FILE] [--picture FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from profiling import bench_kernels


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options and run one benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m profiling.bench", description="Measure speed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    kernels = commands.add_parser(
        "kernels",
        help="each kernel against eager PyTorch, torch.compile and the best public peer",
        description=bench_kernels.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_kernels.add_options(kernels)
    options = parser.parse_args(argv)
    return bench_kernels.bench(options, kernels.error)


if __name__ == "__main__":
    sys.exit(main())
