"""Table, picture and self-contained page of a demonstration."""

from __future__ import annotations

import html
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from typing import Any

from launch.results import Result

# Okabe and Ito's palette: distinguishable for colour-blind readers, in print too.
_COLOURS = ["#555555", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800"]

HEADERS = (
    "host",
    "scheme",
    "accuracy %",
    "time to {target:g} % (s)",
    "speed-up",
    "ms a step",
    "exposed comm. (ms)",
    "MB sent a step",
    "ratio",
)

README_BEGIN, README_END = "<!-- demo:begin -->", "<!-- demo:end -->"

NOTES = (
    "Time is training time: evaluations are not in it. Time to target: until two evaluations in a row reach it.",
    "ms a step: median. Exposed communication: that median less the median of the same step without any "
    "communication, on the same core during the same run; encoding and decoding count as exposed.",
    "MB sent a step: by one rank, headers included, from the kernel's counter of its network interface; mean over "
    "all steps, dense warm-up and flush steps included. Speed-up and ratio: against `none` on the same host framework.",
    "Optimizer: learning rate 0.2, momentum 0.5, cosine decay, for every scheme. These, and the parameters of ScaleCom "
    "and Marsit in configs/demo, were chosen on the same test digits.",
    "Accuracy: mean over seeds, with the lowest and the highest. Times and bytes: medians over seeds. On 1,000 test "
    "digits accuracies closer than about 1 % are equal.",
)


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
        processor = platform.processor() or platform.machine()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        packages = []
        for name in ("torch", "horovod", "deepspeed"):
            try:
                packages.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                continue
        return cls(
            processor,
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
class Report:
    """All runs of one demonstration and what they have in common."""

    results: Sequence[Result]
    machine: str
    network: str
    target: float
    job: str

    def groups(self) -> list[list[Result]]:
        """The runs of each (host, scheme), in order of seeds."""
        grouped: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            grouped.setdefault((result.host, result.scheme), []).append(result)
        return list(grouped.values())

    def time_to_target(self, runs: Sequence[Result]) -> float | None:
        """Median over seeds; None if a run never got there."""
        times = [run.reached(self.target) for run in runs]
        return median(t for t in times if t) if all(times) else None

    def headers(self) -> list[str]:
        return [header.format(target=100 * self.target) for header in HEADERS]

    def rows(self) -> list[list[str]]:
        """One row a scheme, in the order of `HEADERS`; a dash where there is nothing to compare or to reach."""
        baselines = {runs[0].host: runs for runs in self.groups() if runs[0].scheme == "none"}
        rows = []
        for runs in self.groups():
            base, reached = baselines.get(runs[0].host), self.time_to_target(runs)
            dense, sent = self.time_to_target(base) if base else None, median(r.sent_bytes for r in runs)
            accuracies = [100 * r.accuracy for r in runs]
            spread = f" ({min(accuracies):.1f}–{max(accuracies):.1f})" if len(runs) > 1 else ""
            rows.append(
                [
                    runs[0].host,
                    runs[0].scheme,
                    f"{mean(accuracies):.1f}{spread}",
                    f"{reached:.1f}" if reached else "–",
                    f"{dense / reached:.1f}×" if dense and reached else "–",
                    f"{1e3 * median(r.step_s for r in runs):.0f}",
                    f"{1e3 * median(r.exposed_s for r in runs):.0f}",
                    f"{sent / 1e6:.3g}",
                    f"{median(r.sent_bytes for r in base) / sent:.1f}×" if base and sent else "–",
                ]
            )
        return rows

    def text(self) -> str:
        """The table for a terminal."""
        table = [self.headers(), *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEADERS))]
        lines = [
            "  ".join(
                cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def markdown(self) -> str:
        """Heading-free Markdown: job, network, machine, table, notes."""
        table = [self.headers(), ["---", "---", *["---:"] * (len(HEADERS) - 2)], *self.rows()]
        lines = [f"{self.job}. Network: {self.network}. Machine: {self.machine}.", ""]
        lines += ["| " + " | ".join(row) + " |" for row in table]
        return "\n".join([*lines, "", *(f"- {note}" for note in NOTES), ""])

    def figure(self) -> Any:
        """matplotlib figure of the first seed: accuracy against training seconds, and against bytes sent."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.2), layout="constrained")
        by_time, by_bytes = figure.subplots(1, 2, sharey=True)
        for index, (r, *_) in enumerate(self.groups()):
            style = {
                "color": _COLOURS[index % len(_COLOURS)],
                "label": f"{r.scheme}" if r.host == "horovod" else f"{r.scheme} ({r.host})",
                "linewidth": 1.8,
                "linestyle": "-" if r.host == "horovod" else "--",
            }
            accuracy = [100 * p.accuracy for p in r.points]
            by_time.plot([p.seconds for p in r.points], accuracy, **style)
            by_bytes.plot([p.sent_bytes / 1e6 for p in r.points], accuracy, **style)
        by_time.set(xlabel="training time, s", ylabel="test accuracy, %", xlim=(0, None))
        by_bytes.set(xlabel="sent by one rank, MB", xscale="log")
        for axes in (by_time, by_bytes):
            axes.axhline(100 * self.target, color="#999999", linewidth=0.8, linestyle=":")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        best = max((100 * p.accuracy for r in self.results for p in r.points), default=100)
        by_time.set_ylim(max(0, 100 * self.target - 22), best + 1.5)
        by_time.legend(frameon=False, fontsize=9, loc="lower right")
        figure.suptitle(f"{self.job}\n{self.network}", fontsize=10)
        return figure

    def page(self) -> str:
        """Self-contained HTML: no script, no request; the curves are an inline SVG."""
        import matplotlib

        drawing = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo", "font.family": "sans-serif"}):
            self.figure().savefig(drawing, format="svg", metadata={"Date": None})
        svg = drawing.getvalue()
        svg = svg[svg.index("<svg") :]
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.headers())
        body = "\n".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows()
        )
        notes = "\n".join(f"<li>{html.escape(note)}</li>" for note in NOTES)
        facts = "".join(
            f"<dt>{name}</dt><dd>{html.escape(value)}</dd>"
            for name, value in (("Job", self.job), ("Network", self.network), ("Machine", self.machine))
        )
        return _PAGE.format(svg=svg, head=head, body=body, notes=notes, facts=facts)

    def write(self, folder: Path) -> None:
        """Writes demo.png, demo.html and demo.md into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.figure().savefig(folder / "demo.png", dpi=130)
        (folder / "demo.html").write_text(self.page(), encoding="utf-8")
        (folder / "demo.md").write_text(self.markdown(), encoding="utf-8")

    def publish(self, root: Path) -> None:
        """Puts the picture and the page into `root`/docs and the table into `root`/README.md, between its marks."""
        folder = root / "docs"
        self.figure().savefig(folder / "demo.png", dpi=130)
        text = "# The demonstration\n\nWritten by `python -m launch.demo --publish`.\n\n![curves](demo.png)\n\n"
        (folder / "demo.md").write_text(text + self.markdown(), encoding="utf-8")
        readme = root / "README.md"
        before, rest = readme.read_text(encoding="utf-8").split(README_BEGIN)
        after = rest.split(README_END)[1]
        table = "\n".join(line for line in self.markdown().splitlines() if line.startswith("|"))
        caption = f"{self.job}; {self.network}. Machine, date and what the columns mean: [docs/demo.md](docs/demo.md)."
        body = f"{before}{README_BEGIN}\n{table}\n\n{caption}\n{README_END}{after}"
        readme.write_text(body, encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Compressed training on a slow network</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2.5rem auto; padding: 0 1rem }}
 h1 {{ font-size: 1.4rem; font-weight: 600 }}
 svg {{ width: 100%; height: auto }}
 table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
 th, td {{ padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4 }}
 th {{ font-weight: 600; vertical-align: bottom }}
 th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left }}
 dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem }} dt {{ color: #666 }} dd {{ margin: 0 }}
 li, dl {{ font-size: .9rem }}
</style></head><body>
<h1>Compressed training on a slow network</h1>
<dl>{facts}</dl>
{svg}
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table>
<ul>
{notes}
</ul>
</body></html>
"""
