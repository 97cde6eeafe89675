"""What has changed in a vector, and nothing else: packed places and the new values, without loss.

Places are written as Elias (1974) and Fano (1971) do: the low bits of each place as they are, and the high bits as a
row of ones, a zero at every step to the next high value; 2 bits and log2(numel / changes) for each change, at most. A
vector of which so much has changed that its values themselves are shorter travels whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import triton_kernels as K
from .._lazy import torch
from ..errors import CompressionError

if TYPE_CHECKING:
    from torch import Tensor

_HEADER = 8  # bytes of the number of changes
_WIDEST = 16  # bits of a packed code
_INTEGERS = {2: "int16", 4: "int32", 8: "int64"}


def changed(new: Tensor, old: Tensor) -> Tensor:
    """int64 [changes], ascending: places where flat `new` and `old` differ in any bit (0.0 and -0.0 do)."""
    kind = getattr(torch, _INTEGERS[new.element_size()])
    return (new.view(kind) != old.view(kind)).nonzero().flatten()


def patch_bytes(changes: int, numel: int, itemsize: int) -> int:
    """Length of the payload, a multiple of 8: of a patch, or of the whole vector where that is not longer."""
    return _HEADER + min(_sparse_bytes(changes, numel, itemsize), _dense_bytes(numel, itemsize))


def encode_patch(new: Tensor, places: Tensor) -> Tensor:
    """The payload, uint8 [patch_bytes(len(places), ...)], that makes an old vector the flat `new`, which differs from
    it at `places`.
    """
    changes, numel, itemsize = places.numel(), new.numel(), new.element_size()
    payload = torch.zeros(patch_bytes(changes, numel, itemsize), dtype=torch.uint8, device=new.device)
    if _is_dense(changes, numel, itemsize):
        payload[:_HEADER].view(torch.int64).fill_(-1)
        payload[_HEADER : _HEADER + numel * itemsize] = new.view(torch.uint8)
        return payload
    payload[:_HEADER].view(torch.int64).fill_(changes)
    low = _low_bits(changes, numel)
    high = torch.zeros(_steps(changes, numel), dtype=torch.int32, device=new.device)
    high[(places >> low) + torch.arange(changes, device=new.device)] = 1
    parts = [K.pack_bits(high, 1)]
    if low:
        parts.append(K.pack_bits((places & (1 << low) - 1).to(torch.int32), low))
    parts.append(new[places].view(torch.uint8))
    start = _HEADER
    for part in parts:
        payload[start : start + part.numel()] = part
        start += part.numel()
    return payload


def apply_patch(payload: Tensor, flat: Tensor) -> None:
    """Make flat `flat`, the old vector, the new one, in place.

    Raises:
        CompressionError: the payload is not one for a vector of this length and dtype.
    """
    numel, itemsize = flat.numel(), flat.element_size()
    changes = int(payload[:_HEADER].view(torch.int64)) if payload.numel() >= _HEADER else -2
    if changes == -1 and payload.numel() == _HEADER + _dense_bytes(numel, itemsize):
        flat.copy_(payload[_HEADER : _HEADER + numel * itemsize].view(flat.dtype))
        return
    if not 0 <= changes <= numel or payload.numel() != patch_bytes(changes, numel, itemsize):
        raise CompressionError(f"a patch of {payload.numel()} bytes does not fit {numel} values of {flat.dtype}")
    low = _low_bits(changes, numel)
    words, narrow = 4 * -(-_steps(changes, numel) // 32), 4 * -(-changes * low // 32)
    high = K.unpack_bits(payload[_HEADER : _HEADER + words], _steps(changes, numel), 1).nonzero().flatten()
    if high.numel() != changes:
        raise CompressionError(f"a patch announces {changes} places and holds {high.numel()}")
    places = high - torch.arange(changes, device=flat.device) << low
    if low:
        places += K.unpack_bits(payload[_HEADER + words : _HEADER + words + narrow], changes, low)
    if changes and int(places.max()) >= numel:
        raise CompressionError(f"a patch changes a place beyond the end of {numel} values")
    start = _HEADER + words + narrow
    flat[places] = payload[start : start + changes * itemsize].view(flat.dtype)


def _low_bits(changes: int, numel: int) -> int:
    """Bits of a place that stand as they are."""
    return min(_WIDEST, max(0, (numel // max(1, changes)).bit_length() - 1))


def _steps(changes: int, numel: int) -> int:
    """Length of the row of ones and zeros."""
    return changes + (numel >> _low_bits(changes, numel)) + 1


def _sparse_bytes(changes: int, numel: int, itemsize: int) -> int:
    words = -(-_steps(changes, numel) // 32) + -(-changes * _low_bits(changes, numel) // 32)
    return -(-(4 * words + changes * itemsize) // 8) * 8


def _dense_bytes(numel: int, itemsize: int) -> int:
    return -(-numel * itemsize // 8) * 8


def _is_dense(changes: int, numel: int, itemsize: int) -> bool:
    return _dense_bytes(numel, itemsize) <= _sparse_bytes(changes, numel, itemsize)
