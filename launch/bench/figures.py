"""The pictures of the report: narrow, their panels one below the other, so that they are read on a phone too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from launch.document import COLOURS

from .analysis import Times, Who, rate_text
from .settings import bits_per_second

_WIDTH = 6.4
_HOST_STYLES = {"horovod": "-", "deepspeed": "--", "ddp": ":", "torchrun": "-."}
_MARKERS = "osD^vPX*<>"
#: A scheme looks the same in every picture.
_ORDER = (
    "fake",
    "scalecom",
    "marsit",
    "powersgd",
    "double_quantization",
    "demo/scalecom",
    "demo/marsit",
    "none",
    "bf16",
)
#: Parts of a step in the order in which they are stacked.
PHASES = {"compute": "#BBBBBB", "encode": "#E69F00", "decode": "#CC79A7", "exposed": "#D55E00", "other": "#666666"}
_HIDDEN = "#56B4E9"


def panels(heights: Sequence[float]) -> tuple[Any, list[Any]]:
    """matplotlib figure and its axes, one below the other; heights in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.4), layout="constrained")
    axes = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights))[:, 0])
    for each in axes:
        each.grid(alpha=0.25)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def styles(everybody: Sequence[Who]) -> dict[Who, dict[str, Any]]:
    """Colour and marker by scheme, line by host; `none` is grey, `bf16` black."""
    schemes = list(dict.fromkeys(who.scheme.removeprefix("ddp/") for who in everybody))
    place = {scheme: i for i, scheme in enumerate(dict.fromkeys([*_ORDER, *schemes]))}
    colours = {scheme: COLOURS[1 + i % (len(COLOURS) - 1)] for scheme, i in place.items()}
    colours |= {"none": "#999999", "bf16": "#000000"}
    return {
        who: {
            "color": colours[who.scheme.removeprefix("ddp/")],
            "marker": _MARKERS[place[who.scheme.removeprefix("ddp/")] % len(_MARKERS)],
            "linestyle": _HOST_STYLES[who.host],
            "linewidth": 1.6,
            "markersize": 4.5,
            "label": str(who),
        }
        for who in everybody
    }


def speed_up_curves(curves: Mapping[str, Mapping[Who, Times]], title: str) -> Any:
    """Speed-up over each baseline (the keys) against the rate, both logarithmic."""
    figure, axes = panels([3.4] * len(curves))
    everybody = list(dict.fromkeys(who for each in curves.values() for who in each))
    style = styles(everybody)
    for each, (baseline, lines) in zip(axes, curves.items()):
        each.axhline(1, color="#000000", linewidth=0.8)
        for who, ratios in lines.items():
            points = [(bits_per_second(rate), ratio) for rate, ratio in ratios.items()]
            points = [(rate, ratio) for rate, ratio in points if math.isfinite(rate)]
            each.plot(*zip(*points), **style[who])
        rates = sorted({bits_per_second(rate) for ratios in lines.values() for rate in ratios} - {math.inf})
        each.set(xscale="log", yscale="log", ylabel=f"speed-up over {baseline}")
        each.set_xticks(rates, [rate_text(rate) for rate in rates])
        each.set_yticks(*_ticks([ratio for ratios in lines.values() for ratio in ratios.values()]))
        each.minorticks_off()
    axes[-1].set_xlabel("rate of every link, each way")
    _legend(figure, axes)
    figure.suptitle(title, fontsize=11)
    return figure


def step_bars(times: Mapping[Who, Times], title: str) -> Any:
    """Milliseconds of a step on unlimited links, which have no place on an axis of rates."""
    figure, (axes,) = panels([0.5 + 0.27 * len(times)])
    for place, (who, each) in enumerate(times.items()):
        for seconds in each.values():
            axes.barh(place, 1e3 * seconds, color=COLOURS[3] if who.ours else "#BBBBBB", height=0.7)
            axes.text(1e3 * seconds, place, f" {1e3 * seconds:.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(times)), [str(who) for who in times], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("ms a step, links unlimited")
    figure.suptitle(title, fontsize=11)
    return figure


def target_bars(bars: Mapping[str, Mapping[Who, Sequence[float | None]]], title: str) -> Any:
    """Seconds to the target, a panel a rate, a bar a scheme: median over seeds, and the range."""
    figure, axes = panels([0.5 + 0.27 * len(each) for each in bars.values()])
    for each, (rate, times) in zip(axes, bars.items()):
        longest = max((t for values in times.values() for t in values if t is not None), default=1.0)
        for place, (who, values) in enumerate(times.items()):
            known = [value for value in values if value is not None]
            if len(known) < len(values):
                each.text(0, place, f" {len(known)} of {len(values)} runs reach it", va="center", fontsize=8)
                continue
            middle = median(known)
            each.barh(place, middle, color=COLOURS[3] if who.ours else "#BBBBBB", height=0.7)
            each.plot([min(known), max(known)], [place, place], color="#333333", linewidth=1.2)
            each.text(max(known) + longest / 80, place, f"{middle:.3g} s", va="center", fontsize=8)
        each.set_yticks(range(len(times)), [str(who) for who in times], fontsize=9)
        each.set(xlim=(0, 1.15 * longest), ylim=(len(times) - 0.5, -0.5), title=_at(rate))
        each.title.set_fontsize(10)
    axes[-1].set_xlabel("training time to the target, s")
    figure.suptitle(title, fontsize=11)
    return figure


def volume_lines(
    lines: Mapping[Who, Mapping[int, float]], payload: Mapping[Who, Mapping[int, float]], title: str
) -> Any:
    """Bytes a rank sends at a step against the number of ranks; hollow: the payload alone."""
    figure, (axes,) = panels([3.6])
    style = styles(list(lines))
    for who, each in lines.items():
        axes.plot(list(each), [size / 1e6 for size in each.values()], **style[who])
        hollow = {**style[who], "linestyle": "", "fillstyle": "none", "markersize": 8, "label": None}
        axes.plot(list(payload.get(who, {})), [size / 1e6 for size in payload.get(who, {}).values()], **hollow)
    sizes = sorted({size for each in lines.values() for size in each})
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="MB sent per step and rank")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(_no_ticks())
    _legend(figure, [axes])
    figure.suptitle(title, fontsize=11)
    return figure


def phase_bars(steps: Mapping[str, Mapping[Who, Mapping[str, float]]], title: str) -> Any:
    """Milliseconds of a step by phase, a panel a rate; below each bar what the network did behind the computation."""
    figure, axes = panels([0.5 + 0.36 * len(each) for each in steps.values()])
    for each, (rate, schemes) in zip(axes, steps.items()):
        for place, parts in enumerate(schemes.values()):
            left = 0.0
            for phase, colour in PHASES.items():
                width = 1e3 * parts.get(phase, 0.0)
                each.barh(place - 0.1, width, left=left, color=colour, height=0.5)
                left += width
            hidden = 1e3 * parts.get("hidden", 0.0)
            if hidden:
                each.barh(place + 0.28, hidden, color=_HIDDEN, height=0.18)
        each.set_yticks(range(len(schemes)), [str(who) for who in schemes], fontsize=9)
        each.invert_yaxis()
        each.set_title(_at(rate), fontsize=10)
    axes[-1].set_xlabel("ms a step")
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=phase) for phase, colour in PHASES.items()]
    handles.append(Patch(color=_HIDDEN, label="wire, hidden"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def prediction_points(pairs: Sequence[tuple[Who, float, float]], title: str) -> Any:
    """Predicted against measured step time; a band of 15 % around equality."""
    figure, (axes,) = panels([4.2])
    style = styles(list(dict.fromkeys(who for who, _, _ in pairs)))
    ends = [min(min(m, p) for _, m, p in pairs) * 0.8, max(max(m, p) for _, m, p in pairs) * 1.25]
    axes.fill_between([1e3 * e for e in ends], [850 * e for e in ends], [1150 * e for e in ends], color="#EEEEEE")
    axes.plot([1e3 * e for e in ends], [1e3 * e for e in ends], color="#000000", linewidth=0.8)
    for who, each in style.items():
        points = [(1e3 * m, 1e3 * p) for other, m, p in pairs if other == who]
        axes.plot(*zip(*points), **{**each, "linestyle": ""})
    axes.set(xscale="log", yscale="log", xlabel="measured, ms a step", ylabel="predicted, ms a step")
    _legend(figure, [axes])
    figure.suptitle(title, fontsize=11)
    return figure


def quality_points(points: Mapping[str, tuple[float, float]], title: str) -> Any:
    """Error of one step against the achieved ratio, a point a scheme."""
    figure, (axes,) = panels([3.8])
    style = styles([Who("horovod", scheme) for scheme in points])
    for who, (ratio, error) in zip(style, points.values()):
        axes.plot([ratio], [error], **{**style[who], "linestyle": "", "label": who.scheme, "markersize": 7})
    axes.set(xscale="log", yscale="log", xlabel="times fewer bytes than dense fp32", ylabel="vNMSE of one step")
    _legend(figure, [axes])
    figure.suptitle(title, fontsize=11)
    return figure


def _at(rate: str) -> str:
    seconds = bits_per_second(rate)
    return f"links of {rate_text(seconds)}" if math.isfinite(seconds) else "links unlimited"


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One for all panels, below them."""
    known = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels())}
    figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _ticks(ratios: Sequence[float]) -> tuple[list[float], list[str]]:
    """Powers of two, and one more on either side than the ratios need."""
    low = math.floor(math.log2(min([1.0, *ratios])))
    high = math.ceil(math.log2(max([1.0, *ratios])))
    values = [2.0**i for i in range(low, high + 1)]
    return values, [f"{value:g}×" for value in values]


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
