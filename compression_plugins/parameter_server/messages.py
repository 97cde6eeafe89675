"""Wire format. A message is a header of 24 bytes and a payload whose size follows from the header and the problem.

    version u8 | kind u8 | bits u8 | zero u8 | count u32 | step u64 | value f32 | nbytes u32        little-endian

The receiver computes `nbytes` itself from (kind, bits, count) and what both sides know (numel, parts) and refuses a
message that says otherwise, so that no size that a peer chose reaches the allocator. Nothing is unpickled.

    kind      direction  step    count    value  payload
    SNAPSHOT  down       epoch   0        -      x~: fp32 [numel]
    SHARD     down       epoch   parts    -      u32 [count]: parts of the data that this worker draws batches from
    SUM       down       epoch   parts    -      u32 [count]: parts whose gradient sum at x~ is asked for
    MODEL     down       ticket  0        -      bits 0: x is x~; 2..16: [scale | codes] of Q(x); 32: fp32 [numel]
    STOP      down       -       length   -      UTF-8 text, zero padded; bits 1: an error
    TOTAL     up         epoch   samples  loss   sum of gradients at x~: fp32 [numel]; value: sum of losses
    GRADIENT  up         ticket  0        health bits 0: zero; 2..16: [scale | codes]; 32: fp32 [numel]
    INDICES   up         ticket  entries  health [magnitude fp32 | low index bits | high index bits | signs]
    BITMAP    up         ticket  entries  health [magnitude fp32 | numel bits | signs]

A health of NaN says that the gradient is not finite, whatever the payload; it is 0 otherwise.

Each packed array is padded to whole 4-byte words (codes, low and high index bits, signs). Indices are ceil(log2 numel)
bits wide: the low 16 bits in one array, those above in another. `Message.bits_counted` counts what the paper counts
(payload, the width byte of MODEL, the count of sparse messages) with this padding; headers are in `nbytes` only.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .. import triton_kernels as K
from ..errors import CompressionError
from . import quantizer

VERSION = 1
HEADER = struct.Struct("<BBBxIQfI")
#: Bits that say "fp32 as it is".
EXACT = 32
MAX_TEXT = 1000
DIVERGED = "{} is not finite: the run diverged; lower lr, or look for NaN and Inf in the data"
_WIDTHS = (0, *range(quantizer.MIN_BITS, quantizer.MAX_BITS + 1), EXACT)


class Kind(IntEnum):
    """What a message is; see the table above."""

    SNAPSHOT = 1
    SHARD = 2
    SUM = 3
    MODEL = 4
    STOP = 5
    TOTAL = 6
    GRADIENT = 7
    INDICES = 8
    BITMAP = 9


DOWN = frozenset({Kind.SNAPSHOT, Kind.SHARD, Kind.SUM, Kind.MODEL, Kind.STOP})
UP = frozenset(Kind) - DOWN


_CARRIES = {
    Kind.SNAPSHOT: "the model",
    Kind.MODEL: "the model",
    Kind.TOTAL: "the gradient of all samples",
    Kind.GRADIENT: "a gradient",
}


class MessageError(CompressionError):
    """A message that does not follow the format; its sender is disconnected."""


@dataclass(frozen=True)
class Message:
    """See the table above. `payload` is a contiguous uint8 CPU tensor on a 4-byte boundary."""

    kind: Kind
    payload: Tensor
    step: int = 0
    bits: int = 0
    count: int = 0
    value: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, header included."""
        return HEADER.size + self.payload.numel()

    @property
    def bits_counted(self) -> int:
        """Bits as the paper counts them; only messages that carry a vector count."""
        if self.kind in (Kind.SHARD, Kind.SUM, Kind.STOP):
            return 0
        extra = {Kind.MODEL: 8, Kind.INDICES: 32, Kind.BITMAP: 32}.get(self.kind, 0)
        return 8 * self.payload.numel() + (0 if self.bits == EXACT else extra)

    def header(self) -> bytes:
        """The bytes that stand before the payload."""
        return HEADER.pack(VERSION, self.kind, self.bits, self.count, self.step, self.value, self.payload.numel())


@dataclass(frozen=True)
class Header:
    """A header whose fields have been checked; `nbytes` is the size of the payload that follows."""

    kind: Kind
    bits: int
    count: int
    step: int
    value: float
    nbytes: int

    def message(self, payload: Tensor) -> Message:
        """The message of this header and its payload, uint8 [nbytes]."""
        return Message(self.kind, payload, self.step, self.bits, self.count, self.value)


def parse_header(data: bytes | bytearray, accept: frozenset[Kind], numel: int, parts: int, samples: int) -> Header:
    """Check a header of `HEADER.size` bytes.

    Args:
        accept: kinds that may arrive on this side.
        numel, parts, samples: of the problem, known to the receiver.

    Raises:
        MessageError: naming what is wrong; nothing of the payload has been read then.
    """
    version, kind_number, bits, count, step, value, nbytes = HEADER.unpack(data)
    if version != VERSION:
        raise MessageError(f"wire version {version} where {VERSION} is spoken")
    if kind_number not in accept:
        raise MessageError(f"a message of kind {kind_number} where one of {sorted(map(int, accept))} may come")
    kind = Kind(kind_number)
    limits = {Kind.SHARD: parts, Kind.SUM: parts, Kind.STOP: MAX_TEXT, Kind.TOTAL: samples, Kind.INDICES: numel,
              Kind.BITMAP: numel}  # fmt: skip
    if count > limits.get(kind, 0):
        raise MessageError(f"{kind.name} with a count of {count:,}, at most {limits.get(kind, 0):,} can be")
    widths = {Kind.MODEL: _WIDTHS, Kind.GRADIENT: _WIDTHS, Kind.STOP: (0, 1)}.get(kind, (0,))
    if bits not in widths:
        raise MessageError(f"{kind.name} of {bits} bits; valid: {', '.join(map(str, widths))}")
    expected = payload_bytes(kind, bits, count, numel)
    if nbytes != expected:
        raise MessageError(f"{kind.name} announces {nbytes:,} bytes where its header and the model make {expected:,}")
    return Header(kind, bits, count, step, value, nbytes)


def payload_bytes(kind: Kind, bits: int, count: int, numel: int) -> int:
    """Size of a payload from the fields of its header."""
    if kind in (Kind.SNAPSHOT, Kind.TOTAL):
        return 4 * numel
    if kind in (Kind.SHARD, Kind.SUM):
        return 4 * count
    if kind is Kind.STOP:
        return 4 * -(-count // 4)
    if kind is Kind.INDICES:
        low, high = _index_widths(numel)
        return 4 * (1 + K.layout.words(count, low) + K.layout.words(count, high) + K.layout.words(count, 1))
    if kind is Kind.BITMAP:
        return 4 * (1 + K.layout.words(numel, 1) + K.layout.words(count, 1))
    if bits == EXACT:
        return 4 * numel
    return quantizer.payload_bytes(numel, bits) if bits else 0


# --- vectors ---


def exact(kind: Kind, x: Tensor, step: int, count: int = 0, value: float = 0.0) -> Message:
    """A message of x itself, any shape, as fp32: 4 bytes per value."""
    bits = EXACT if kind in (Kind.MODEL, Kind.GRADIENT) else 0
    payload = x.detach().to("cpu", torch.float32, copy=True).view(torch.uint8)
    return Message(kind, payload, step, bits, count, value)


def quantized(kind: Kind, x: Tensor, bits: int, key: K.Key, scale: float, step: int) -> Message:
    """Q(x) with `bits` and one scale, max|x| > 0."""
    return Message(kind, quantizer.encode(x, bits, key, scale).cpu(), step, bits)


def nothing(kind: Kind, step: int) -> Message:
    """MODEL: x is the snapshot. GRADIENT: zero."""
    return Message(kind, torch.empty(0, dtype=torch.uint8), step)


def not_finite(step: int) -> Message:
    """GRADIENT: this worker has computed values that are not finite, or run away."""
    return Message(Kind.GRADIENT, torch.empty(0, dtype=torch.uint8), step, value=math.nan)


def sparse(signs: Tensor, magnitude: float, step: int) -> Message:
    """`signs * magnitude` (signs int32 [numel] in {-1, 0, 1}) as indices or, when that is smaller, as a bitmap."""
    numel = signs.numel()
    indices = signs.nonzero().view(-1)
    count = indices.numel()
    negative = K.pack_bits((signs[indices] < 0).to(torch.int32), 1)
    kind = min((Kind.INDICES, Kind.BITMAP), key=lambda k: payload_bytes(k, 0, count, numel))
    if kind is Kind.BITMAP:
        where = [K.pack_bits(signs.abs(), 1)]
    else:
        low, high = _index_widths(numel)
        where = [K.pack_bits((indices & ((1 << low) - 1)).to(torch.int32), low)] if low else []
        where += [K.pack_bits((indices >> low).to(torch.int32), high)] if high else []
    head = torch.tensor([magnitude], dtype=torch.float32, device=signs.device).view(torch.uint8)
    return Message(kind, torch.cat((head, *where, negative)).cpu(), step, 0, count)


def vector(message: Message, numel: int) -> Tensor:
    """fp32 [numel] that a checked message carries.

    Raises:
        MessageError: the payload contradicts itself.
        Diverged: it is not finite.
    """
    payload, bits = message.payload, message.bits
    if not math.isfinite(message.value):
        raise quantizer.Diverged(DIVERGED.format("the gradient or the loss"))
    if message.kind in (Kind.INDICES, Kind.BITMAP):
        return _sparse_vector(message, numel)
    if message.kind in (Kind.SNAPSHOT, Kind.TOTAL) or bits == EXACT:
        result = payload.view(torch.float32)
    elif bits:
        result = quantizer.decode(payload, numel, bits)
    else:
        return torch.zeros(numel)
    if not bool(result.isfinite().all()):
        raise quantizer.Diverged(DIVERGED.format(_CARRIES[message.kind]))
    return result


def _sparse_vector(message: Message, numel: int) -> Tensor:
    payload, count = message.payload, message.count
    magnitude = float(payload[:4].view(torch.float32))
    if not 0 <= magnitude <= quantizer.LARGEST:
        raise MessageError(f"a sparse gradient of magnitude {magnitude:g}")
    cut = payload.numel() - 4 * K.layout.words(count, 1)
    where = payload[4:cut]
    if message.kind is Kind.BITMAP:
        indices = K.unpack_bits(where, numel, 1).nonzero().view(-1)
    else:
        low, high = _index_widths(numel)
        middle = 4 * K.layout.words(count, low)
        indices = torch.zeros(count, dtype=torch.int64)
        if low:
            indices |= K.unpack_bits(where[:middle], count, low).long()
        if high:
            indices |= K.unpack_bits(where[middle:], count, high).long() << low
    increasing = bool((indices[1:] > indices[:-1]).all()) if count > 1 else True
    if indices.numel() != count or not increasing or (count and int(indices[-1]) >= numel):
        raise MessageError(f"a sparse gradient whose {count:,} indices do not increase within {numel:,} elements")
    negative = K.unpack_bits(payload[cut:], count, 1)
    result = torch.zeros(numel)
    result[indices] = magnitude * (1 - 2 * negative).to(torch.float32)
    return result


def _index_widths(numel: int) -> tuple[int, int]:
    """Bits of an index in 0..numel-1 that go to the low and to the high array."""
    width = max(0, numel - 1).bit_length()
    return min(width, 16), max(0, width - 16)


# --- lists and text ---


def numbers(kind: Kind, values: list[int], step: int) -> Message:
    """A message of integers, int32 on the wire: part numbers (SHARD, SUM)."""
    return Message(kind, torch.tensor(values, dtype=torch.int32).view(torch.uint8), step, 0, len(values))


def read_numbers(message: Message, parts: int) -> list[int]:
    """Part numbers, distinct and below `parts`."""
    values = message.payload.view(torch.int32).tolist()
    if len(set(values)) != len(values) or not all(0 <= value < parts for value in values):
        raise MessageError(f"{message.kind.name} names parts {values} of a data set in {parts} parts")
    return values


def stop(text: str, error: bool) -> Message:
    """The run is over, or an error ends it for this worker."""
    data = text.encode()[:MAX_TEXT]
    padded = bytearray(data + bytes(-len(data) % 4))
    payload = torch.frombuffer(padded, dtype=torch.uint8) if padded else torch.empty(0, dtype=torch.uint8)
    return Message(Kind.STOP, payload, 0, int(error), len(data))


def read_text(message: Message) -> str:
    """The text of a STOP message."""
    return bytes(message.payload[: message.count].tolist()).decode(errors="replace")
