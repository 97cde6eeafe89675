"""What a run reports: traffic and one row an epoch."""

from __future__ import annotations

from dataclasses import dataclass

from . import messages
from .messages import Kind, Message


@dataclass
class Traffic:
    """Sums over all workers. Bits as the paper counts them (payloads in whole 4-byte words), bytes with headers."""

    snapshot_bits: int = 0
    down_bits: int = 0
    up_bits: int = 0
    wire_bytes: int = 0

    @property
    def bits(self) -> int:
        """Snapshots included."""
        return self.snapshot_bits + self.down_bits + self.up_bits

    def count(self, message: Message) -> None:
        self.wire_bytes += message.nbytes
        if message.kind in (Kind.SNAPSHOT, Kind.TOTAL):
            self.snapshot_bits += message.bits_counted
        elif message.kind in messages.DOWN:
            self.down_bits += message.bits_counted
        else:
            self.up_bits += message.bits_counted


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
