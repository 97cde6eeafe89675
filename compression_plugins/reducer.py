"""Runs buckets: gradients in, averaged gradients out. Owns the state and knows no host framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .config import Config
from .errors import CompressionError
from .plan import Bucket
from .schemes.base import Call, Reduction
from .seconds import Seconds
from .state import State, reshard
from .telemetry import Telemetry
from .transports.base import Handle, Transport
from .triton_kernels import Key

__all__ = ["Job", "Reducer", "reshard"]

_MICRO_STREAMS = 1 << 8  # random streams are counted per reduction within a step


class Job:
    """One bucket on its way. `phase` counts the operations that it has started."""

    def __init__(self, reducer: Reducer, reduction: Reduction) -> None:
        self._reducer, self._reduction = reducer, reduction
        self._handle: Handle | None = None
        self._result: Tensor | None = None
        self.done = False
        self.phase = 0
        self._send(None)

    def poll(self) -> bool:
        """Go as far as possible without blocking; True when the result is there."""
        while not self.done and self._handle.poll():  # type: ignore[union-attr]
            self.advance()
        return self.done

    def advance(self) -> None:
        """Block until the operation in flight is done, and start the next."""
        if not self.done:
            with self._reducer.seconds.spent("exposed"):
                value = self._handle.wait()  # type: ignore[union-attr]
            self._reducer.seconds.landed()
            self._send(value)

    def result(self) -> Tensor:
        """The average, fp32 [bucket.numel]; waits for it, together with every other job of the reducer."""
        if not self.done:
            self._reducer.drain()
        if self._result is None:
            raise CompressionError("this reduction was aborted")
        return self._result

    def _send(self, value: Tensor | None) -> None:
        with self._reducer.seconds.spent("decode" if self.phase else "encode"):
            try:
                self._handle = self._reduction.send(value)
            except StopIteration as stop:
                self._result, self._handle, self.done = stop.value, None, True
                return
        self.phase += 1
        self._reducer.seconds.launched()


class Reducer:
    """Averages buckets over the ranks of a transport, as a configuration says.

    Args:
        config: the same on every rank; adapters compare `config.digest()` before the first step.
        transport: the ranks.
        telemetry: where counters go, or None.
        undo: keep what a step changes until `end_step`, so that a skipped step (overflow) can be taken back.

    Raises:
        UnsupportedError: a scheme cannot run on that number of ranks.

    Attributes:
        step: optimizer steps done; survives a resume.
        seconds: where its time went.
    """

    def __init__(
        self, config: Config, transport: Transport, telemetry: Telemetry | None = None, undo: bool = False
    ) -> None:
        config.check_ranks(transport.size)
        self.config, self.transport, self.telemetry = config, transport, telemetry
        self.state = State(undo)
        self.step = 0
        self.seconds = Seconds()
        self._jobs: list[Job] = []
        self._uses: dict[int, int] = {}  # reductions of a bucket in this step: micro-batches
        self._elements = 0

    def start(self, bucket: Bucket, flat: Tensor, shards: Sequence[int] | None = None) -> Job:
        """Start to average `flat` (fp32 [bucket.numel]) over ranks.

        `flat` belongs to the job from now on: it is overwritten, and the result may be it. (A fresh tensor of this size
        for every step would cost a CPU more in page faults than most codecs do in arithmetic.)
        With `shards` (elements that each rank owns, in rank order) only this rank's shard of the result has meaning.
        Where the transport is ordered, every rank must start the same buckets in the same order.
        """
        if flat.shape != (bucket.numel,):
            raise CompressionError(
                f"a bucket of {bucket.numel} elements was given a tensor of shape {tuple(flat.shape)}"
            )
        if shards is not None and (len(shards) != self.transport.size or sum(shards) != bucket.numel):
            raise CompressionError(
                f"shards {list(shards)} do not cover {bucket.numel} elements on {self.transport.size} ranks"
            )
        use = self._uses[bucket.id] = self._uses.get(bucket.id, -1) + 1
        key = Key(self.config.seed, bucket.id, self.step, self.transport.rank, use * _MICRO_STREAMS)
        call = Call(
            transport=self.transport.scoped(f"{bucket.id:08x}"),
            key=key,
            step=self.step,
            compressed_step=self.step - self.config.warmup_steps,
            segments=bucket.segments,
            shards=shards,
            residual=lambda: self.state.residual(bucket),
            state=lambda slot, name, make: self.state.tensor(slot, name, make, bucket.device),
            vector=lambda slot: self.state.vector(slot, bucket),
        )
        scheme = bucket.scheme.dense if self.step < self.config.warmup_steps else bucket.scheme
        self._elements += bucket.numel
        job = Job(self, scheme.reduce(flat, call) if bucket.numel else _nothing(flat))
        if not job.done:
            self._jobs.append(job)
        return job

    def reduce(self, bucket: Bucket, flat: Tensor, shards: Sequence[int] | None = None) -> Tensor:
        """`start` and wait."""
        return self.start(bucket, flat, shards).result()

    def progress(self) -> None:
        """Advance what is ready, without blocking. Where order is a contract between ranks, nothing happens."""
        if not self.transport.ordered:
            self._jobs = [job for job in self._jobs if not job.poll()]

    def drain(self) -> None:
        """Finish all jobs, level by level: nobody waits for a second operation while a first one is outstanding.

        Job by job would deadlock where ranks hold their jobs in different orders.
        """
        while self._jobs:
            level = min(job.phase for job in self._jobs)
            for job in self._jobs:
                if job.phase == level:
                    job.advance()
            self._jobs = [job for job in self._jobs if not job.done]

    def abort(self) -> None:
        """Forget jobs in flight, after an error or a rollback of the host."""
        self._jobs = []
        self._uses.clear()
        self.seconds.in_flight = 0

    def end_step(self, skipped: bool = False) -> None:
        """Call once after each optimizer step. A skipped one leaves no trace in memory and does not count."""
        self._uses.clear()
        self._jobs = [job for job in self._jobs if not job.done]  # whoever polled them does not tell
        if skipped:
            self.state.rollback()
        else:
            self.state.commit()
            self.step += 1
        if self.telemetry is not None:
            self.telemetry.step(self, self._elements, skipped)
        self._elements = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain dicts, numbers and tensors; loads with `torch.load(..., weights_only=True)`. Differs on every rank."""
        return {"version": 1, "step": self.step, "size": self.transport.size, **self.state.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue, bit for bit, from `state_dict()` of the same rank; for another number of ranks use `reshard`
        first.
        """
        if saved.get("version") != 1:
            raise CompressionError(
                f"compression state of version {saved.get('version')!r} is unknown; this package reads 1"
            )
        self.abort()
        self.step = int(saved["step"])
        self.state.load_state_dict(saved)


def _nothing(flat: Tensor) -> Reduction:
    return flat.clone()
    yield  # a generator without an operation
