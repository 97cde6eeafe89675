"""Times of this package on this machine: of its kernels, or of its schemes.

compression-plugins bench kernels --only 'sign_*'
compression-plugins bench schemes --schemes scalecom qsgd

`compression-plugins bench FILE.yaml` measures an experiment of real jobs; it needs the repository and has options of
its own (`compression-plugins bench FILE.yaml --help`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import CompressionError


def parser() -> argparse.ArgumentParser:
    """The parser of `bench kernels` and `bench schemes`."""
    top = argparse.ArgumentParser(
        prog="compression-plugins bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="kernels, schemes or FILE.yaml", required=True)
    kernels = commands.add_parser("kernels", help="time of every kernel against the bytes it must move")
    kernels.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    kernels.add_argument("--numel", type=int, help="default: 6,553,600 (a 25 MiB bucket) on cpu, 2**26 on cuda")
    kernels.add_argument("--repeats", type=int, default=9, help="runs after warm-up, of which the median counts")
    kernels.add_argument("--only", action="append", default=[], metavar="PATTERN", help="kernels, for example 'sign_*'")
    kernels.add_argument("--no-compile", action="store_true", help="leave out torch.compile (most of the time)")
    kernels.add_argument(
        "--static", nargs="+", metavar="sm_90", help="compile the Triton kernels for these targets; needs no GPU"
    )
    kernels.add_argument("--markdown", action="store_true", help="with --static: tables for a document")
    kernels.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a row")
    kernels.set_defaults(run=_kernels)
    schemes = commands.add_parser("schemes", help="time, size and error of every scheme, beside bf16")
    schemes.add_argument("--schemes", nargs="+", metavar="NAME", help="default: every registered one")
    schemes.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    schemes.add_argument("--numel", type=int, default=1 << 20, help="elements of the bucket")
    schemes.add_argument("--ranks", type=int, default=2, help="ranks, all in this process")
    schemes.add_argument("--steps", type=int, default=10, help="steps after warm-up, of which the median counts")
    schemes.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a row")
    schemes.set_defaults(run=_schemes)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Also `python -m compression_plugins.bench`. A mistake of the user prints one line and returns 2."""
    options = parser().parse_args(argv)
    try:
        options.run(options)
    except CompressionError as error:
        print(f"compression-plugins bench: {error}", file=sys.stderr)
        return 2
    return 0


def _kernels(options: argparse.Namespace) -> None:
    import torch

    from . import kernels, static

    if options.static:
        static.run(options.static, options.numel, options.only, options.json, options.markdown)
        return
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kernels.run(device, options.numel, options.repeats, not options.no_compile, options.only, options.json)


def _schemes(options: argparse.Namespace) -> None:
    import torch

    from . import schemes

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    schemes.run(device, options.schemes, options.numel, options.ranks, options.steps, options.json)


if __name__ == "__main__":
    sys.exit(main())
