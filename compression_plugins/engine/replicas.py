"""Whether all ranks hold the same parameters, to the bit (`check_every`)."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import MismatchError
from ..transports.base import Transport


def compare(parameters: Mapping[str, Tensor], transport: Transport, step: int) -> None:
    """Compare checksums of all parameters, in one exchange of 8 bytes for each.

    Args:
        parameters: by name, the same names in the same order on every rank.

    Raises:
        MismatchError: on every rank, naming the first tensor that differs and the ranks that differ from the first.
    """
    sums = [_checksum(p) for p in parameters.values()]
    device = sums[0].device if sums else torch.device("cpu")
    own = torch.stack([*(s.to(device) for s in sums), torch.tensor(_machine(), device=device)])
    rows = transport.scoped("replicas").all_gather(own).wait().cpu()
    *differ, machines = (rows != rows[0]).unbind(1)
    for name, ranks in zip(parameters, differ):
        if ranks.any():
            others = ranks.nonzero().flatten().tolist()
            which = f"rank {others[0]}" if len(others) == 1 else f"ranks {', '.join(map(str, others))}"
            told = f"after step {step} parameter {name!r} of {which} differs from that of rank 0 (check_every)"
            if (ranks & machines).any():
                why = (
                    "they run on other processors or another torch than rank 0, where replicas that compute the same "
                    "thing can differ in the last bit: use equal machines"
                )
            else:
                why = (
                    "the machines are alike, so ranks did something differently: initial values, a seed, a step that "
                    "one of them skipped; or a memory or the network is damaged (verify: true looks for it)"
                )
            raise MismatchError(f"{told}; {why}")


def _checksum(p: Tensor) -> Tensor:
    """int64 scalar of all bits of `p`."""
    data = p.detach().contiguous().view(-1).view(torch.uint8)
    words = data.new_zeros(-(-len(data) // 8) * 8)
    words[: len(data)] = data
    values = words.view(torch.int64)
    places = torch.arange(1, 2 * len(values), 2, device=p.device)  # odd: no bit is multiplied away
    return (values * places).sum()


def _machine() -> int:
    """A number of this rank's processor and torch."""
    parts = [torch.__version__, platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    if torch.cuda.is_available():
        parts += [torch.cuda.get_device_name(), str(torch.version.cuda)]
    return zlib.crc32("\n".join(parts).encode())
