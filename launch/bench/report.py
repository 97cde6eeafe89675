"""Page and pictures of what `compression-plugins bench` has measured.

compression-plugins report out/bench/crossover/results.jsonl
compression-plugins report out/bench/*/results.jsonl --out out/report

Every part appears once its rows are there, so a sweep may be looked at while it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import cast

from compression_plugins.errors import CompressionError, ConfigError, nearest
from launch.document import page

from .analysis import Results
from .sections import sections
from .settings import REAL_MODELS, ROOT

_STYLE = """
 h2 { font-size: 1.15rem; font-weight: 600; margin-top: 2.5rem }
 svg { display: block; max-width: 660px; margin: 0 auto }
 table { font-size: .88rem }
 ul.notes { padding-left: 1.2rem; color: #444 }
"""
DOCS = ROOT / "docs" / "benchmarks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `compression-plugins report`."""
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.jsonl", help="files that `bench` has written")
    parser.add_argument("--out", type=Path, help="folder of page and pictures; default: that of the first file")
    parser.add_argument(
        "--target", action="append", default=[], metavar="MODEL=METRIC", help="other than the experiment's"
    )
    parser.add_argument("--publish", action="store_true", help="write the parts into their pages under docs")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises `ConfigError`."""
    out = options.out or options.results[0].parent
    print(write(options.results, out, options.publish, parse_targets(options.target)))
    return 0


def parse_targets(texts: Sequence[str]) -> dict[str, float]:
    """`["mlp=90"]` as a mapping. Raises `ConfigError`."""
    found = {}
    for text in texts:
        model, _, value = text.partition("=")
        if model not in REAL_MODELS:
            raise ConfigError(f"--target {text}: unknown model {model!r}{nearest(model, REAL_MODELS)}")
        try:
            found[model] = float(value)
        except ValueError:
            raise ConfigError(f"--target {text}: write MODEL=METRIC, for example mlp=90") from None
    return found


def write(
    paths: Sequence[Path],
    out: Path,
    publish_too: bool = False,
    targets: Mapping[str, float] | None = None,
    keys: Container[str] | None = None,
) -> Path:
    """Writes index.html, and a picture and a Markdown text a section, into `out`; returns the page's path.

    Args:
        keys: of the cells to report; all that the files hold without it.

    Raises:
        ConfigError: a file cannot be read or holds no measured row; nothing to publish.
    """
    results = Results.load(paths, keys)
    if not results.rows:
        raise ConfigError(f"no measured row in {', '.join(map(str, paths))}")
    out.mkdir(parents=True, exist_ok=True)
    found = sections(results, targets or {})
    for section in found:
        section.figure.savefig(out / f"{section.name}.png", dpi=130)
        (out / f"{section.name}.md").write_text(section.markdown() + _measured(results), encoding="utf-8")
    failures = [_failure(row) for row in results.failures]
    # A section has a table's `html`, and is more: heading, picture, tables and their notes in one place.
    html = page("Does compression help? Measured", _facts(results), [], found, failures)
    path = out / "index.html"
    path.write_text(html.replace("</style>", f"{_STYLE}</style>", 1), encoding="utf-8")
    if publish_too:
        publish([section.name for section in found], out)
    return path


def publish(names: Sequence[str], out: Path, pages: Path = DOCS) -> list[str]:
    """Put every section for which a page has marks between them; returns the names of those.

    Raises:
        ConfigError: no page has marks for any of them, or marks are doubled or turned round.
    """
    from launch.reproduce import publish as put

    texts = [path.read_text(encoding="utf-8") for path in pages.glob("*.md")]
    wanted = [name for name in names if any(f"<!-- {name}:begin -->" in text for text in texts)]
    if not wanted:
        raise ConfigError(f"no page in {pages} has marks for {', '.join(names)}")
    for name in wanted:
        try:
            put(name, out, pages)
        except CompressionError as error:
            raise ConfigError(str(error)) from None
    return wanted


def _facts(results: Results) -> dict[str, str]:
    rows = results.rows
    dates = sorted(row["date"] for row in rows)
    counts = {kind: len(results.of(kind)) for kind in ("speed", "accuracy", "quality", "prediction")}
    cells = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    failed = f"; {len(results.failures)} failed, listed at the end" if results.failures else ""
    return {
        "Cells": cells + failed,
        "Machine": _machines(results),
        "Commit": ", ".join(sorted({_commit(row) for row in rows})),
        "Measured": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        "Network": "; ".join(sorted({row["network"] for row in rows if "network" in row})) or "none",
    }


def _machines(results: Results) -> str:
    found = []
    for row in results.rows:
        about = row["provenance"]
        machine, versions = about["machine"], about["versions"]
        packages = ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "horovod", "deepspeed") if name in versions
        )
        found.append(
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; {machine['system']}; "
            f"{packages}"
        )
    return " | ".join(dict.fromkeys(found))


def _measured(results: Results) -> str:
    dates = sorted(row["date"][:10] for row in results.rows)
    commits = ", ".join(sorted({_commit(row) for row in results.rows}))
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"- Measured on {_machines(results)}; {when}; commit {commits}.\n"


def _commit(row: Mapping[str, object]) -> str:
    about = cast(dict[str, object], row["provenance"])
    return f"{str(about['commit'])[:10]}{' with changes' if about['dirty'] else ''}"


def _failure(row: Mapping[str, object]) -> str:
    names = ("kind", "host", "scheme", "model", "ranks", "rate", "seed")
    return f"failed: {' '.join(str(row[name]) for name in names)}: {str(row['error']).splitlines()[-1]}"
