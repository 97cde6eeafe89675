"""The model side of double quantization under DeepSpeed: ranks compute with Q(x), the optimizer keeps x.

Stage 0: every rank holds all weights, so they are quantized in place between steps (`weights.QuantizedWeights`).
ZeRO 1, 2 and BF16_Optimizer: each rank steps its partition of the master weights, which stay exact, and DeepSpeed then
all-gathers the partitions; here each rank sends the codes of its partition and every rank, the owner too, computes with
what they decode to. The bits of a parameter follow the mu rule (Yu, Wu, Huang, 2019, arXiv 1805.10111).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import triton_kernels as K
from ...errors import ConfigError
from ...optimizer.quantized_weights import QuantizedWeights, mu_rule_bits, weight_codec
from ...schemes.double_quantization import DoubleQuantization

if TYPE_CHECKING:
    from .session import Session

_STREAM = 1 << 30  # random numbers of weights, apart from those of gradients


class Piece(NamedTuple):
    """Elements [start, start + numel) of a flat buffer, all of one rank and one parameter, or padding."""

    start: int
    numel: int
    quantized: bool


def weights_of(session: Session) -> LocalWeights | GatheredWeights | None:
    """The model side that the configuration asks for, or None."""
    schemes = {row.name: row.scheme for row in session.plan.rows if isinstance(row.scheme, DoubleQuantization)}
    schemes = {name: scheme for name, scheme in schemes.items() if scheme.weights}
    if not schemes:
        return None
    laws = {(scheme.mu, scheme.snapshot_steps) for scheme in schemes.values()}
    if len(laws) > 1:
        raise ConfigError(f"rules give double_quantization several (mu, snapshot_steps): {sorted(laws)}; use one pair")
    scheme = next(iter(schemes.values()))
    optimizer = session.engine.optimizer
    flats = getattr(optimizer, "bit16_groups_flat", None) or getattr(optimizer, "bf16_groups_flat", None)
    if flats:
        groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
        return GatheredWeights(session, scheme, flats, groups, set(schemes))
    return LocalWeights(session, scheme, set(schemes))


class LocalWeights:
    """Stage 0."""

    def __init__(self, session: Session, scheme: DoubleQuantization, names: set[str]) -> None:
        self.session = session
        named = [(name, p) for name, p in session.engine.module.named_parameters() if name in names]
        self._weights = QuantizedWeights(scheme, named, session.reducer.config.seed)

    def before_step(self) -> None:
        self._weights.restore()

    def after_step(self, step: int) -> None:
        self._weights.quantize(step)

    def gather(self, output: Tensor, mine: Tensor) -> bool:
        return False

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, the module holds the exact weights."""
        self._weights.restore()
        yield
        self.resume()

    def resume(self) -> None:
        """Compute with what the last step's `after_step` gave."""
        if self.session.reducer.step:
            self._weights.quantize(self.session.reducer.step - 1)

    def state_dict(self) -> dict[str, Any]:
        return self._weights.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._weights.load_state_dict(saved or {"exact": {}, "snapshots": {}})


class GatheredWeights:
    """ZeRO 1, 2 and BF16_Optimizer.

    Keeps the snapshot of the own partition only: fp32, 1/n of the model.
    """

    def __init__(
        self,
        session: Session,
        scheme: DoubleQuantization,
        flats: list[Tensor],
        groups: list[list[Tensor]],
        names: set[str],
    ) -> None:
        self.session, self.scheme = session, scheme
        self._pieces = [self._cut(flat, group, names) for flat, group in zip(flats, groups, strict=True)]
        self._index = {flat.data_ptr(): i for i, flat in enumerate(flats)}
        self._snapshots: dict[int, Tensor] = {}
        self._step: int | None = None

    def before_step(self) -> None:
        pass

    def after_step(self, step: int) -> None:
        pass

    @torch.no_grad()
    def gather(self, output: Tensor, mine: Tensor) -> bool:
        """Fill `output` with every rank's decoded partition; `mine` is this rank's, a view of it.

        False: the exact all-gather is due, of a snapshot or of a buffer that holds no weights.
        """
        index = self._index.get(output.data_ptr())
        if index is None:
            return False
        step = self.session.reducer.step if self._step is None else self._step
        if index not in self._snapshots or step % self.scheme.snapshot_steps == 0:
            self._snapshots[index] = mine.float().clone()
            return False
        pieces, transport = self._pieces[index], self.session.reducer.transport
        own = pieces[transport.rank]
        most = max(map(len, pieces))
        bits = self._bits(mine, self._snapshots[index], own)
        widths = torch.tensor(bits + [0] * (most - len(bits)), dtype=torch.int32, device=mine.device)
        rows: list[list[int]] = transport.all_gather(widths).wait().tolist()
        lengths = [
            [_nbytes(piece.numel, width, mine.element_size()) for piece, width in zip(part, row, strict=False)]
            for part, row in zip(pieces, rows, strict=True)
        ]
        payload = torch.zeros(max(map(sum, lengths)), dtype=torch.uint8, device=mine.device)
        base = own[0].start if own else 0
        for number, (piece, width, slot) in enumerate(
            zip(own, bits, payload[: sum(lengths[transport.rank])].split(lengths[transport.rank]), strict=True)
        ):
            x = mine[piece.start - base : piece.start - base + piece.numel]
            if width:
                key = K.Key(self.session.reducer.config.seed, number, step, transport.rank, _STREAM + index)
                weight_codec(width, piece.numel).encode(x.float(), key, out=slot)
            else:
                raw = x.contiguous().view(torch.uint8)
                slot[: raw.numel()] = raw
        received = transport.all_gather(payload).wait()
        for part, row, sizes, data in zip(pieces, rows, lengths, received, strict=True):
            for piece, width, slot in zip(part, row, data[: sum(sizes)].split(sizes), strict=False):
                home = output[piece.start : piece.start + piece.numel]
                if width:
                    home.copy_(weight_codec(width, piece.numel).decode(slot, piece.numel))
                else:
                    home.copy_(slot[: piece.numel * home.element_size()].view(home.dtype))
        return True

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, the module holds the exact weights."""
        self.session.engine.optimizer.update_lp_params()  # outside `gathering`: DeepSpeed's own all-gather
        yield
        self.resume()

    def resume(self) -> None:
        """Compute with what the last step's all-gather gave: the same codes, drawn again."""
        if self.session.reducer.step:
            self._step = self.session.reducer.step - 1
            with self.session.gathering():
                self.session.engine.optimizer.update_lp_params()
            self._step = None

    def state_dict(self) -> dict[str, Any]:
        return {"snapshots": {index: snapshot.clone() for index, snapshot in self._snapshots.items()}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        device = self.session.engine.device
        snapshots = saved.get("snapshots", {})
        self._snapshots = {int(index): snapshot.clone().to(device) for index, snapshot in snapshots.items()}

    def _cut(self, flat: Tensor, group: list[Tensor], names: set[str]) -> list[list[Piece]]:
        """For each rank the pieces of its partition of `flat`, which cover it without gaps."""
        size = flat.numel() // self.session.size
        marks = []
        for p in group:
            start = (p.data_ptr() - flat.data_ptr()) // flat.element_size()
            marks.append((start, start + p.numel(), self.session.names[id(p)] in names))
        parts: list[list[Piece]] = []
        for rank in range(self.session.size):
            low, high, position = rank * size, (rank + 1) * size, rank * size
            pieces: list[Piece] = []
            for start, stop, quantized in sorted(marks):
                first, last = max(start, low), min(stop, high)
                if first < last:
                    if position < first:
                        pieces.append(Piece(position, first - position, False))
                    pieces.append(Piece(first, last - first, quantized))
                    position = last
            if position < high:
                pieces.append(Piece(position, high - position, False))
            parts.append(pieces)
        return parts

    def _bits(self, mine: Tensor, snapshot: Tensor, pieces: list[Piece]) -> list[int]:
        """Bits of each piece by the mu rule; 0 where the values themselves are as short, or required."""
        cuts = [piece.numel for piece in pieces]
        measures = [
            torch.stack([x.abs().max().float(), (x.float() - before).norm()])
            for x, before, piece in zip(mine.split(cuts), snapshot.split(cuts), pieces, strict=True)
            if piece.quantized
        ]
        values = iter(torch.stack(measures).tolist() if measures else [])
        found = []
        for piece in pieces:
            bits = None
            if piece.quantized:
                largest, distance = next(values)
                bits = mu_rule_bits(largest, distance, piece.numel, self.scheme.mu)
            found.append(bits if bits is not None and bits < 8 * mine.element_size() else 0)
        return found


def _nbytes(numel: int, bits: int, element_size: int) -> int:
    """Length of a piece's payload, a multiple of four; `bits` 0 stands for the values themselves."""
    return weight_codec(bits, numel).nbytes(numel) if bits else -(-numel * element_size // 4) * 4
