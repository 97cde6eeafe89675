"""Run one experiment end to end: records as JSONL, a picture, and a headline as the last line.

python -m launch.reproduce --list
python -m launch.reproduce asylpg-bits [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from compression_plugins.errors import CompressionError, nearest

#: Name -> module with DESCRIPTION and run(out, quick) -> headline.
EXPERIMENTS = {
    "asylpg-bits": "launch.experiments.asylpg_bits",
    "asylpg-mu": "launch.experiments.asylpg_mu",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="experiment; see --list")
    parser.add_argument("--list", action="store_true", help="name the experiments and stop")
    parser.add_argument("--quick", action="store_true", help="a small version that ends within a minute")
    parser.add_argument("--out", type=Path, help="folder of the results; default out/reproduce/NAME")
    args = parser.parse_args()
    if args.list:
        for name, module in EXPERIMENTS.items():
            print(f"{name:20s} {importlib.import_module(module).DESCRIPTION}")
        return
    if args.name not in EXPERIMENTS:
        parser.error(f"unknown experiment {args.name!r}{nearest(str(args.name), EXPERIMENTS)}")
    out = args.out or Path("out/reproduce") / args.name
    started = time.monotonic()
    torch.set_num_threads(1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        headline = importlib.import_module(EXPERIMENTS[args.name]).run(out, args.quick)
    except (CompressionError, ModuleNotFoundError, OSError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"results in {out}, {time.monotonic() - started:.0f} s")
    print(headline)


if __name__ == "__main__":
    main()
