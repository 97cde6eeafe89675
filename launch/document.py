"""Tables, pictures and self-contained pages that demonstrations and experiments leave behind."""

from __future__ import annotations

import html
import io
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from compression_plugins.bench.table import aligned

# Okabe and Ito's palette: distinguishable for colour-blind readers, in print too.
COLOURS = ["#555555", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800"]


@dataclass(frozen=True)
class Machine:
    """Where and when the figures were measured."""

    processor: str
    cores: int
    memory_gib: float
    system: str
    versions: str
    date: str

    @classmethod
    def here(cls) -> Machine:
        from compression_plugins.bench.timing import cpu_name  # brings torch

        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        packages = []
        for name in ("torch", "horovod", "deepspeed"):
            try:
                packages.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                continue
        return cls(
            cpu_name(),
            len(os.sched_getaffinity(0)),
            round(memory, 1),
            f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
            ", ".join(packages),
            datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )

    def __str__(self) -> str:
        where = f"{self.processor}, {self.cores} cores, {self.memory_gib:g} GiB; {self.system}; {self.versions}"
        return f"{where}; {self.date}"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `left` columns are words, the others figures."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def text(self) -> str:
        """The table as plain text, for a terminal."""
        lines = aligned([self.headers, *self.rows], words=range(self.left))
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def markdown(self) -> str:
        rule = ["---"] * self.left + ["---:"] * (len(self.headers) - self.left)
        return "\n".join("| " + " | ".join(row) + " |" for row in [self.headers, rule, *self.rows])

    def html(self) -> str:
        def cells(tag: str, row: Sequence[str]) -> str:
            return "".join(
                f"<{tag}{' class=word' if i < self.left else ''}>{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(row)
            )

        body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{cells('th', self.headers)}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


class Part(Protocol):
    """What a page is made of: a `Table`, or anything else that knows its HTML."""

    def html(self) -> str: ...


def page(
    title: str, facts: Mapping[str, str], figures: Sequence[Any], parts: Sequence[Part], notes: Sequence[str]
) -> str:
    """Self-contained HTML: no script, no request; matplotlib's figures are inline SVG."""
    return _PAGE.format(
        title=html.escape(title),
        facts="".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items()),
        figures="\n".join(map(svg, figures)),
        parts="\n".join(part.html() for part in parts),
        notes="\n".join(f"<li>{html.escape(note)}</li>" for note in notes),
    )


def svg(figure: Any) -> str:
    """A matplotlib figure as an element of a page."""
    import matplotlib

    drawing = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "figure", "font.family": "sans-serif"}):
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    text = drawing.getvalue()
    return text[text.index("<svg") :]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2.5rem auto; padding: 0 1rem }}
 h1 {{ font-size: 1.4rem; font-weight: 600 }}
 svg {{ width: 100%; height: auto }}
 table {{ border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums }}
 th, td {{ padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4 }}
 th {{ font-weight: 600; vertical-align: bottom }}
 table {{ display: block; overflow-x: auto }} td {{ white-space: nowrap }}
 .word {{ text-align: left; white-space: normal }}
 dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem }} dt {{ color: #666 }} dd {{ margin: 0 }}
 li, dl {{ font-size: .9rem }}
 @media (max-width: 700px) {{ dl {{ display: block }} }}
</style></head><body>
<h1>{title}</h1>
<dl>{facts}</dl>
{figures}
{parts}
<ul>
{notes}
</ul>
</body></html>
"""
