"""What buckets have sent, beside what the table at start-up had promised."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from .plan import Bucket

#: Parts of the promise by which all traffic may be off.
TOLERANCE = 0.05


class Ledger:
    """Bytes by bucket, in steps that are done and were not dense by `warmup_steps`.

    Bytes are the mean over ranks, as the table's are. Some methods send more in one step than in the next, so only
    whole periods count.

    Args:
        size: ranks.
        period: steps after which traffic repeats itself.
        every: steps between exchanges; 1: gradients travel in each.
        node: ranks that average among themselves first.
    """

    def __init__(self, size: int, period: int, every: int, node: int = 1) -> None:
        self._size, self._period, self._every, self._node = size, period * every, every, node
        self._open: Counter[Bucket] = Counter()  # of the step, or of the period, that is not over
        self._uses: Counter[Bucket] = Counter()
        self._of_period: Counter[Bucket] = Counter()
        self._of_period_uses: Counter[Bucket] = Counter()
        self._steps = 0
        self.steps = 0  # of whole periods
        self.sent: Counter[Bucket] = Counter()
        self.uses: Counter[Bucket] = Counter()

    def book(self, bucket: Bucket, nbytes: float, sharded: bool) -> None:
        """One reduction of `bucket` has sent `nbytes`."""
        bucket = replace(bucket, sharded=sharded) if sharded != bucket.sharded else bucket
        self._open[bucket] += nbytes  # type: ignore[assignment]
        self._uses[bucket] += 1

    def drop(self) -> None:
        """The step did not happen."""
        self._open.clear()
        self._uses.clear()

    def end_step(self) -> None:
        """It is done."""
        self._of_period.update(self._open)
        self._of_period_uses.update(self._uses)
        self.drop()
        self._steps += 1
        if self._steps % self._period == 0:
            self.sent.update(self._of_period)
            self.uses.update(self._of_period_uses)
            self._of_period.clear()
            self._of_period_uses.clear()
            self.steps = self._steps

    def report(self, reductions: int) -> str:
        """One sentence where more than `TOLERANCE` is off, with the tensors at fault; else "".

        Args:
            reductions: of each bucket within a step, as the host has announced them.
        """
        promised = {bucket: self._promise(bucket) * reductions * self.steps / self._every for bucket in self.sent}
        total, sent = sum(promised.values()), sum(self.sent.values())
        if not self.steps or abs(sent - total) <= TOLERANCE * total:
            return ""
        faults = sorted(self.sent, key=lambda b: -abs(self.sent[b] - promised[b]))[:3]
        details = [
            f"the bucket of {fault.segments[0].name!r} ({len(fault.segments)} tensors, {fault.scheme.name}) "
            f"{self.sent[fault] / self.steps / 1e6:.3f} instead of {promised[fault] / self.steps / 1e6:.3f} MB"
            f"{self._often(fault, reductions)}"
            for fault in faults
            if abs(self.sent[fault] - promised[fault]) > TOLERANCE * total / 10
        ]
        return (
            f"{sent / self.steps / 1e6:.3f} MB were sent per step and rank where the table had promised "
            f"{total / self.steps / 1e6:.3f} MB: {'; '.join(details)}"
        )

    def _promise(self, bucket: Bucket) -> float:
        return bucket.wire_bytes(self._size, self._node)

    def _often(self, bucket: Bucket, reductions: int) -> str:
        often = self.uses[bucket] / self.steps * self._every
        return f", reduced {often:.3g} times in a step" if abs(often - reductions) > TOLERANCE * reductions else ""
