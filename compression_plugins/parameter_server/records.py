"""What a run reports: traffic, where time went, and one row per epoch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.seconds import Spent
from . import messages
from .messages import Kind, Message

#: Updates of which a server's `delays` and `arrivals` tell, at least.
KEPT = 100_000


@dataclass
class Traffic:
    """Sums over all workers. Bits as the paper counts them (payloads in whole 4-byte words), bytes with headers."""

    snapshot_bits: int = 0
    down_bits: int = 0
    up_bits: int = 0
    wire_bytes: int = 0

    @property
    def bits(self) -> int:
        """All bits, both ways, snapshots included."""
        return self.snapshot_bits + self.down_bits + self.up_bits

    def count(self, message: Message) -> None:
        """Add a message, in whichever direction it went."""
        self.wire_bytes += message.nbytes
        if message.kind in (Kind.SNAPSHOT, Kind.TOTAL):
            self.snapshot_bits += message.bits_counted
        elif message.kind in messages.DOWN:
            self.down_bits += message.bits_counted
        else:
            self.up_bits += message.bits_counted


@dataclass
class Seconds(Spent):
    """Where the time of one process went, in seconds of its wall clock; nothing depends on it.

    Attributes:
        computing: gradients on a worker; sums and updates on the server.
        coding: from vectors to messages and back.
        waiting: of a worker, for the server's messages and for the network to take its own.
    """

    computing: float = 0.0
    coding: float = 0.0
    waiting: float = 0.0


@dataclass
class Epoch:
    """One snapshot and, once they are done, the inner steps after it.

    Attributes:
        loss: P(x~), penalties included.
        gradient_norm: ||grad f(x~)||, of the smooth part.
        bits: of the run so far, this snapshot included, as the paper counts them.
        model_bits: mean width of the models sent, fp32 as 32, "x is x~" as 0.
        survivors: mean share of non-zero entries of sparse gradients, or None.
        delay: largest delay of an update.
    """

    epoch: int
    step: int
    loss: float
    gradient_norm: float
    bits: int
    wire_bytes: int
    model_bits: float = 0.0
    survivors: float | None = None
    delay: int = 0


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class Tally:
    """What an epoch has seen so far."""

    widths: _Mean = field(default_factory=_Mean)
    survivors: _Mean = field(default_factory=_Mean)
    delay: int = 0


def keep(values: list[int], value: int) -> None:
    """Append, and let go of the earlier half once there are twice `KEPT`."""
    values.append(value)
    if len(values) >= 2 * KEPT:
        del values[:KEPT]
