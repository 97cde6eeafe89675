"""Run one experiment end to end: records as JSONL, a picture, a table, a page, and a headline as the last line.

python -m launch.reproduce --list
python -m launch.reproduce asylpg-bits [--quick] [--out FOLDER] [--publish]
python -m launch.reproduce parity --only method=dense --only steps=2000 --only steps=6000
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from compression_plugins.errors import CompressionError, nearest

from .experiments.study import RECORDS

#: Name -> module with DESCRIPTION and run(out, quick) -> headline; one whose parts may be run alone has KEYS, and takes
#: {key: values} as `only`.
EXPERIMENTS = {
    "asylpg-bits": "launch.experiments.asylpg.bits",
    "asylpg-mu": "launch.experiments.asylpg.mu",
    "asylpg-logistic": "launch.experiments.asylpg.logistic",
    "asylpg-netlab": "launch.experiments.asylpg.netlab",
    "scalecom-volume": "launch.experiments.scalecom.volume",
    "scalecom-similarity": "launch.experiments.scalecom.similarity",
    "scalecom-large-batch": "launch.experiments.scalecom.large_batch",
    "scalecom-accuracy": "launch.experiments.scalecom.accuracy",
    "marsit-accuracy": "launch.experiments.marsit.accuracy",
    "marsit-deviation": "launch.experiments.marsit.deviation",
    "marsit-k": "launch.experiments.marsit.k",
    "codecs": "launch.experiments.codecs",
    "scale": "launch.experiments.scale",
    "levels": "launch.experiments.levels",
    "parity": "launch.experiments.parity.accuracy",
}
PAGES = Path(__file__).parents[1] / "docs"


def publish(name: str, out: Path, pages: Path = PAGES) -> Path:
    """Put the table between the marks of this experiment, in the page under `pages` that has them, and the picture
    beside that page; of an experiment with parts the records too, which `resume` reads.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    for path in sorted(pages.glob("**/*.md")):
        text = path.read_text(encoding="utf-8")
        if text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end):
            before, after = text.split(begin)[0], text.split(end)[1]
            table = (out / f"{name}.md").read_text(encoding="utf-8")
            path.write_text(f"{before}{begin}\n{table}{end}{after}", encoding="utf-8")
            shutil.copy(out / f"{name}.png", path.parent / f"{name}.png")
            if _has_parts(name):
                shutil.copy(out / RECORDS, path.parent / f"{name}.jsonl")
            return path
    raise CompressionError(f"no page in {pages} has the marks {begin} and {end}, once each and in this order")


def resume(name: str, out: Path, pages: Path = PAGES) -> None:
    """Let an experiment with parts that has recorded nothing in `out` go on from the runs that were published."""
    for path in pages.glob(f"**/{name}.jsonl"):
        if _has_parts(name) and not (out / RECORDS).exists():
            shutil.copy(path, out / RECORDS)


def _has_parts(name: str) -> bool:
    return name in EXPERIMENTS and hasattr(importlib.import_module(EXPERIMENTS[name]), "KEYS")


def _parts(parser: argparse.ArgumentParser, name: str, words: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """What `--only` adds to the arguments of an experiment."""
    if not words:
        return {}
    if not _has_parts(name):
        parser.error(f"{name} has no parts that --only could choose")
    only: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            parser.error(f"--only takes KEY=VALUE, not {word!r}")
        only.setdefault(key, []).append(value)
    return {"only": only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="experiment; see --list")
    parser.add_argument("--list", action="store_true", help="name the experiments and stop")
    parser.add_argument("--quick", action="store_true", help="a small version that ends within a minute")
    parser.add_argument("--out", type=Path, help="folder of the results; default out/reproduce/NAME")
    parser.add_argument("--publish", action="store_true", help="write the result into its page under docs")
    parser.add_argument("--only", action="append", metavar="KEY=VALUE", help="run a part, where there are parts")
    args = parser.parse_args()
    if args.list:
        for name, module in EXPERIMENTS.items():
            print(f"{name:22s} {importlib.import_module(module).DESCRIPTION}")
        return
    if args.name not in EXPERIMENTS:
        parser.error(f"unknown experiment {args.name!r}{nearest(str(args.name), EXPERIMENTS)}")
    if args.quick and args.publish:
        parser.error("--publish wants the whole experiment, not --quick")
    only = _parts(parser, args.name, args.only or [])
    out = args.out or Path("out/reproduce") / args.name
    started = time.monotonic()
    torch.set_num_threads(1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not args.quick:
            resume(args.name, out)
        headline = importlib.import_module(EXPERIMENTS[args.name]).run(out, args.quick, **only)
        if args.publish:
            print(f"written into {publish(args.name, out)}")
    except (CompressionError, ModuleNotFoundError, OSError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"results in {out}, {time.monotonic() - started:.0f} s")
    print(headline)


if __name__ == "__main__":
    main()
