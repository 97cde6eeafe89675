"""Table, picture and self-contained page of a demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from launch.document import COLOURS, Table, page
from launch.results import Result

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
    "all steps, dense warm-up and flush steps included. Speed-up and ratio: against `none` on the same host framework; "
    "speed-up is the median over seeds of the ratio of two runs with one seed.",
    "Optimizer: learning rate 0.2, momentum 0.5, cosine decay, for every scheme. These, and the parameters of ScaleCom "
    "and Marsit in configs/demo, were chosen on the same test digits.",
    "Accuracy: mean over seeds, with the lowest and the highest. Times and bytes: medians over seeds. On 1,000 test "
    "digits accuracies closer than about 1 % are equal.",
)


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

    def speed_up(self, runs: Sequence[Result], base: Sequence[Result]) -> float | None:
        """Median over seeds of the ratio to the baseline's time with the same seed; None if a run never got there."""
        dense = {run.seed: run.reached(self.target) for run in base}
        pairs = [(dense.get(run.seed), run.reached(self.target)) for run in runs]
        ratios = [ours and theirs and theirs / ours for theirs, ours in pairs]
        return median(r for r in ratios if r) if all(ratios) else None

    def headers(self) -> list[str]:
        return [header.format(target=100 * self.target) for header in HEADERS]

    def rows(self) -> list[list[str]]:
        """One row per scheme, in the order of `HEADERS`; a dash where there is nothing to compare or to reach."""
        baselines = {runs[0].host: runs for runs in self.groups() if runs[0].scheme == "none"}
        rows = []
        for runs in self.groups():
            base, reached = baselines.get(runs[0].host), self.time_to_target(runs)
            faster, sent = self.speed_up(runs, base) if base else None, median(r.sent_bytes for r in runs)
            accuracies = [100 * r.accuracy for r in runs]
            spread = f" ({min(accuracies):.1f}–{max(accuracies):.1f})" if len(runs) > 1 else ""
            rows.append(
                [
                    runs[0].host,
                    runs[0].scheme,
                    f"{mean(accuracies):.1f}{spread}",
                    f"{reached:.1f}" if reached else "–",
                    f"{faster:.1f}×" if faster else "–",
                    f"{1e3 * median(r.step_s for r in runs):.0f}",
                    f"{1e3 * median(r.exposed_s for r in runs):.0f}",
                    f"{sent / 1e6:.3g}",
                    f"{median(r.sent_bytes for r in base) / sent:.1f}×" if base and sent else "–",
                ]
            )
        return rows

    def table(self) -> Table:
        return Table(self.headers(), self.rows(), left=2)

    def markdown(self) -> str:
        """Heading-free Markdown: job, network, machine, table, notes."""
        head = f"{self.job}. Network: {self.network}. Machine: {self.machine}."
        return "\n".join([head, "", self.table().markdown(), "", *(f"- {note}" for note in NOTES), ""])

    def figure(self) -> Any:
        """matplotlib figure of the first seed: accuracy against training seconds, and against bytes sent."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.2), layout="constrained")
        by_time, by_bytes = figure.subplots(1, 2, sharey=True)
        for index, (r, *_) in enumerate(self.groups()):
            style = {
                "color": COLOURS[index % len(COLOURS)],
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
        facts = {"Job": self.job, "Network": self.network, "Machine": self.machine}
        return page("Compressed training on a slow network", facts, [self.figure()], [self.table()], NOTES)

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
