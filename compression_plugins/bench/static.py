"""What the Triton kernels compile to, for CUDA cards that are not here: no GPU is needed.

Triton compiles each kernel for the target; the tools in its wheel (ptxas, cuobjdump, nvdisasm) then tell registers,
spills, widths of global accesses and the instructions of the machine code. From these follows a prediction: which part
of the card's memory bandwidth the kernel may use before the rate at which instructions issue limits it,

    issue bound = (lanes' instructions a second / instructions an element) / (bytes a second / bytes an element).

Below 1 a kernel cannot reach the memory bound; instructions rarely issue in more than 60 to 75 % of the cycles, so 1.6
leaves the memory to be the limit. It is a prediction, not a measurement. Instructions are those of the machine code,
all branches included and each loop once (``loops`` says how many there are), without the routines that serve the rare
operands of an IEEE division or square root (subnormal numbers), which stand apart in the code.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, UnsupportedError
from ..triton_kernels import dispatch
from . import kernels
from .table import aligned

SIZES = (2**20, 2**20 + 1021)  # elements; of the second nothing is a multiple of a vector access
COPY = 0.9  # of the published bandwidth, about what a copy reaches
ISSUED = 128  # instructions of lanes that a multiprocessor issues in a cycle: four schedulers, a warp each


@dataclass(frozen=True)
class Card:
    """Published figures of the usual card of a target: multiprocessors, clock in Hz, bytes per second."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def per_byte(self) -> float:
        """Instructions of lanes that issue while a copy moves one byte."""
        return self.multiprocessors * ISSUED * self.clock / (COPY * self.bandwidth)


CARDS = {
    80: Card("A100 SXM 80 GB", 108, 1.41e9, 2.039e12),
    86: Card("A10", 72, 1.695e9, 0.6e12),
    89: Card("L4", 58, 2.04e9, 0.3e12),
    90: Card("H100 SXM", 132, 1.755e9, 3.35e12),  # peak figures of these two mean 1.98 GHz; under load clocks fall
    100: Card("B200", 148, 1.85e9, 8e12),
}


@dataclass
class Code:
    """One launch: what its machine code holds and over how many lanes it runs."""

    kernel: str
    lanes: int
    instructions: int
    rare: int  # instructions of the routines that stand apart
    loops: int
    registers: int
    spills: int
    shared: int
    loads: dict[str, int]
    stores: dict[str, int]
    fp64: int
    int64: int
    barriers: int


def target_of(name: str) -> int:
    """90 for ``sm_90``."""
    found = re.fullmatch(r"sm_(\d+)", name)
    if not found or int(found[1]) not in CARDS:
        raise ConfigError(f"no target {name!r}: give one of {', '.join(f'sm_{number}' for number in CARDS)}")
    return int(found[1])


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[Callable[[Callable[[], object]], list[Code]]]:
    """Inside, no Triton kernel computes anything; the function that is given compiles those that a call launches.

    Raises:
        UnsupportedError: Triton is not there, or is its interpreter.
    """
    if dispatch.interpreting():
        raise UnsupportedError("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it")
    try:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
    except ModuleNotFoundError as error:
        raise UnsupportedError("static figures need triton, which is not installed: `pip install triton`") from error

    class Target:
        """The part of a Triton driver that compilation asks; kernels are kept per device, so each target is one."""

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return capability

        def get_current_stream(self, device):
            return 0

    codes: list[Code] | None = None
    launch, before = JITFunction.run, driver._active  # asking `active` would look for a GPU

    def record(self, *args, grid, warmup, **kwargs):
        if codes is not None:
            compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
            lanes = 32 * compiled.metadata.num_warps * math.prod(grid)
            codes.append(disassembled(self.__name__, compiled, lanes))

    def compiled(call: Callable[[], object]) -> list[Code]:
        nonlocal codes
        found: list[Code] = []
        codes = found
        try:
            call()
        finally:
            codes = None
        return found

    driver.set_active(Target())
    JITFunction.run = record
    try:
        with dispatch.running("triton", computing=False):
            yield compiled
    finally:
        JITFunction.run = launch
        driver.set_active(before)


def disassembled(kernel: str, compiled: Any, lanes: int) -> Code:
    """Reads a compiled kernel, launched over ``lanes``, by the tools that Triton ships."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        text = _output(tools / "nvdisasm", "-c", file.name)
    main, *rare = re.split(r"^\$__internal_\S+:$", text, flags=re.MULTILINE)
    operations = collections.Counter(_operations(main))

    def count(*starts: str) -> int:
        return sum(number for name, number in operations.items() if name.startswith(starts))

    return Code(
        kernel=kernel,
        lanes=lanes,
        instructions=operations.total(),
        rare=sum(len(_operations(part)) for part in rare),
        loops=_loops(main),
        registers=_number(usage, "REG"),
        spills=count("LDL", "STL"),
        shared=int(compiled.metadata.shared),
        loads=_widths(operations, "LDG"),
        stores=_widths(operations, "STG"),
        fp64=count("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "F2F.F64", "F2F.F32.F64", "I2F.F64", "MUFU.RCP64H"),
        int64=count("IMAD.WIDE", "IADD.64", "IMAD.X", "IADD3.X", "IADD.X", "LEA.HI.X", "UIADD3.X", "UIMAD.WIDE"),
        barriers=count("BAR."),
    )


def _output(tool: Path, *arguments: str) -> str:
    if not tool.exists():
        raise UnsupportedError(f"this build of Triton ships no {tool.name}: install the wheel of the package index")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _number(usage: str, name: str) -> int:
    return max(map(int, re.findall(rf"\b{name}:(\d+)", usage)))


_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def _operations(text: str) -> list[str]:
    """Names of the instructions; lines of data begin with a dot, and NOP fills up the end."""
    return [name for name in _LINE.findall(text) if name != "NOP"]


def _loops(text: str) -> int:
    """Branches to a label that stands before them; the last line of a kernel branches to itself and is none."""
    seen, loops = set(), 0
    lines = text.splitlines()
    for number, line in enumerate(lines):
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            seen.add(label[1])
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in seen and not lines[number - 1].startswith(branch[1]):
            loops += 1
    return loops


def _widths(operations: collections.Counter[str], start: str) -> dict[str, int]:
    """Number of global accesses by their width in bits."""
    widths: collections.Counter[str] = collections.Counter()
    for name, number in operations.items():
        if name.split(".")[0] == start:
            parts = set(name.split("."))
            small = "8" if parts & {"U8", "S8"} else "16" if parts & {"U16", "S16"} else "32"
            widths[next((wide for wide in ("256", "128", "64") if wide in parts), small)] += number
    return {width: widths[width] for width in ("256", "128", "64", "32", "16", "8") if widths[width]}


def measure(capability: int, sizes: Sequence[int], names: set[str]) -> list[dict[str, Any]]:
    """One row for each kernel, setting and size."""
    card = CARDS[capability]
    rows = []
    for numel in sizes:
        with compiling(capability) as compiled:
            for case in kernels.cases(numel, torch.device("cpu")):
                if case.kernel not in names:
                    continue
                codes = compiled(case.bind(getattr(kernels.K, case.kernel)))
                rows.append({"target": f"sm_{capability}", "numel": numel} | _row(case, numel, card, codes))
    return rows


def _row(case: kernels.Case, numel: int, card: Card, codes: Sequence[Code]) -> dict[str, Any]:
    instructions = sum(code.instructions * code.lanes for code in codes) / numel
    row: dict[str, Any] = {
        "kernel": case.kernel,
        "setting": case.setting,
        "bytes": case.bytes / numel,
        "instructions": instructions,
        "issue_bound": card.per_byte * case.bytes / numel / instructions,
    }
    for name in ("registers", "shared"):
        row[name] = max(getattr(code, name) for code in codes)
    for name in ("rare", "loops", "spills", "fp64", "int64", "barriers"):
        row[name] = sum(getattr(code, name) for code in codes)
    for name in ("loads", "stores"):
        row[name] = _wide(codes, name, numel)
    return row


def _wide(codes: Sequence[Code], name: str, numel: int) -> dict[str, float]:
    """Bytes an element that accesses of each width move, at most: masked lanes and branches not taken count too."""
    moved: collections.Counter[str] = collections.Counter()
    for code in codes:
        for width, number in getattr(code, name).items():
            moved[width] += int(width) // 8 * number * code.lanes
    return {width: amount / numel for width, amount in moved.items()}


def run(
    targets: Sequence[str],
    numel: int | None = None,
    only: Sequence[str] = (),
    path: Path | None = None,
    markdown: bool = False,
) -> list[dict[str, Any]]:
    """Compiles, prints a table for each target, and writes one JSON object a row to ``path``.

    Raises:
        ConfigError: an unknown target, or no kernel matches ``only``.
        UnsupportedError: Triton or one of its tools is not there.
    """
    capabilities = [target_of(name) for name in targets]
    names = kernels.matching(only)
    if numel is not None and numel < 1:
        raise ConfigError(f"numel must be at least 1, got {numel}")
    rows = []
    for capability in capabilities:
        found = measure(capability, SIZES if numel is None else (numel,), names)
        print(table(capability, found, markdown))
        rows += found
    if path is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


HEAD = (
    "kernel", "setting", "size", "B/elt", "instr/elt", "issue bound", "registers", "spills", "shared",
    "loads B/elt", "stores B/elt", "fp64", "int64", "barriers", "loops",
)  # fmt: skip


def table(capability: int, rows: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """The card and its figures, then one line a row."""
    import triton

    card = CARDS[capability]
    lines = [
        f"sm_{capability}, predicted for {card.name}: {card.multiprocessors} multiprocessors, "
        f"{card.clock / 1e9:g} GHz, {card.bandwidth / 1e12:g} TB/s, of which a copy reaches {COPY:.0%}: "
        f"{card.per_byte:.1f} instructions a byte; triton {triton.__version__}",
        "",
    ]
    cells = [HEAD, *(_cells(row) for row in rows)]
    if markdown:
        rule = "| --- | --- |" + " ---: |" * (len(HEAD) - 2)
        body = ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([*lines, body[0], rule, *body[1:], ""])
    return "\n".join([*lines, *aligned(cells, words=(0, 1, 9, 10)), ""])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def moved(widths: dict[str, float]) -> str:
        return ", ".join(f"{width} bit {amount:.2g}" for width, amount in widths.items()) or "-"

    return (
        row["kernel"],
        row["setting"],
        f"{row['numel']:,}",
        f"{row['bytes']:.3f}",
        f"{row['instructions']:.1f}",
        f"{row['issue_bound']:.2f}",
        *(str(row[name]) for name in ("registers", "spills", "shared")),
        moved(row["loads"]),
        moved(row["stores"]),
        *(str(row[name]) for name in ("fp64", "int64", "barriers", "loops")),
    )
