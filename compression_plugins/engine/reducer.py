"""Runs buckets: gradients in, averaged gradients out. Owns the state and knows no host framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..core.call import Call, Reduction
from ..core.clock import Clock
from ..core.memory import finite, restore_unless
from ..core.streams import Purpose, stream
from ..errors import CompressionError, UnsupportedError
from ..optimizer.directions import GRADIENT
from ..schemes.base import NoCompression, Scheme
from ..transports.base import Transport
from ..transports.verified import Verified
from ..triton_kernels import Key
from .absence import ZeroTensors
from .driver import Engine, Work
from .health import Health
from .ledger import Ledger
from .levels import Levels
from .marks import averaged
from .notice import warn
from .plan import Bucket
from .saved import STATE_VERSION
from .state import EVERY, CallSlots, State
from .telemetry import Cosine, Counters, Telemetry


class Reducer:
    """Averages buckets over the ranks of a transport, as a configuration says.

    What a step changes in the state is kept apart until `end_step`, so that a step which does not happen (an overflow,
    gradients that the script drops) leaves no trace.

    Args:
        config: the same on every rank; sessions compare `config.digest()` before the first step.
        transport: the ranks.
        telemetry: where counters go, or None.

    Raises:
        UnsupportedError: a scheme cannot run on that number of ranks.

    Attributes:
        step: optimizer steps done; survives a resume.
        engine: what runs the reductions.
        beside: bytes that a dense job would have sent in this step beside gradients, where those are compressed, too.
        levels: the groups of a job of two levels; None in any other, and before `form_levels`.
        parameters: by name, for directions that look at them; a host shows whole ones only.

    Example, of one rank of a `torch.distributed` job::

        import torch
        from compression_plugins import Config, Reducer
        from compression_plugins.engine.plan import TensorSpec, make_plan
        from compression_plugins.transports.torch_distributed import TorchDistributed

        config = Config.load("scalecom")
        (bucket,) = make_plan(config, [TensorSpec("weight", (256, 256), "float32")]).buckets
        reducer = Reducer(config, TorchDistributed())
        average = reducer.reduce(bucket, torch.randn(bucket.numel))
        reducer.end_step()
    """

    def __init__(self, config: Config, transport: Transport, telemetry: Telemetry | None = None) -> None:
        config.check_ranks(transport.size)
        self.config, self.telemetry = config, telemetry
        self.transport = Verified(transport) if config.verify and transport.size > 1 else transport
        self.health = Health(config.on_nonfinite, self.transport)
        self.ledger = Ledger(transport.size, config.period, config.every)
        self.state = State()
        self.engine = Engine(transport.ordered)
        self.step, self.beside = 0, 0.0
        self.parameters: Mapping[str, Tensor] = {}
        self._uses: dict[int, int] = {}  # reductions of a bucket in this step: micro-batches
        self._dense = 0.0  # bytes that the host would have sent
        self._zeros = ZeroTensors()
        self._cosine = Cosine()
        self.levels: Levels | None = None
        self._formed, self._saved_node = False, EVERY

    def form_levels(self, device: torch.device | str = "cpu") -> None:
        """Make the groups of ranks that `levels` asks for. Every rank calls it at the same time, before the first step.

        Args:
            device: of tensors that ranks may exchange.

        Raises:
            UnsupportedError: they cannot be made, or a scheme cannot run on so many nodes.
        """
        self._formed, size = True, self.transport.size
        if self.config.levels is not None and size > 1:
            levels = Levels(self.transport, self.config.levels, device)
            self.config.check_schemes(size if levels.node == 1 else levels.nodes)
            if levels.node > 1:
                self.levels = levels
                self.ledger = Ledger(size, self.config.period, self.config.every, levels.node)
        self._check_parts()

    def _check_parts(self) -> None:
        """What a rank of a node remembers is its own part: where nodes have changed since, all begin anew."""
        if self._saved_node not in (EVERY, self.node):
            if self.transport.rank == 0:
                warn(
                    f"the state was saved by nodes of {self._saved_node} ranks, and these have {self.node}: what ranks "
                    "had not sent yet is lost, the residuals start at zero"
                )
            self.state.load_state_dict({"vectors": {}, "tensors": {}})
        self._saved_node = self.node

    @property
    def node(self) -> int:
        """Ranks that average among themselves before they meet others; 1 where there are no levels."""
        return 1 if self.levels is None else self.levels.node

    @property
    def warming(self) -> bool:
        """Whether this step is one of the dense ones before compression."""
        return self.step < self.config.warmup_steps

    @property
    def local(self) -> bool:
        """Whether ranks train by themselves in this step, and gradients stay where they are."""
        return self.config.every > 1 and not self.warming

    @property
    def round_ends(self) -> bool:
        """Whether ranks exchange what they have learned when this step is done."""
        return self.local and (self.step + 1 - self.config.warmup_steps) % self.config.every == 0

    def scheme_of(self, bucket: Bucket) -> Scheme:
        """What reduces `bucket` in this step."""
        return NoCompression() if self.warming else bucket.scheme

    def as_is(self, bucket: Bucket) -> bool:
        """Whether `bucket` travels as the host has it in this step: in its own dtype, scaled as its loss is. All else
        is fp32, in units of the unscaled loss.
        """
        return self.scheme_of(bucket).host_dense and not bucket.direction.formed

    def start(
        self,
        bucket: Bucket,
        flat: Tensor,
        shards: Sequence[int] | None = None,
        absent: frozenset[str] = frozenset(),
        exact: bool = False,
        around: Callable[[Reduction, Call], Reduction] | None = None,
    ) -> Work[Tensor]:
        """Start to average `flat` over ranks.

        `flat` belongs to the work from now on: it is overwritten, and the result may be it. (A fresh tensor of this
        size for every step would cost a CPU more in page faults than most codecs do in arithmetic.)
        Where the transport is ordered, every rank must start the same buckets in the same order.

        Args:
            flat: [bucket.numel]: fp32, or what `as_is` says.
            shards: elements that each rank owns, in rank order: only this rank's shard of the result has meaning.
            absent: parameters of which this rank has no gradient, here zeros: it keeps what it remembers of them to
                itself. On a CPU a gradient that is zero everywhere counts as absent too; on a GPU looking would mean
                waiting.
            exact: average what `flat` holds, without compression, direction or a trace in the state.
            around: makes one program of the scheme's and what else belongs to this reduction.

        Raises:
            CompressionError: `flat`, `shards` or the configuration does not fit the bucket.
            UnsupportedError: a direction meets a second reduction of the bucket within one step, or shards where it
                or `levels` needs the whole average.
        """
        if flat.shape != (bucket.numel,):
            raise CompressionError(
                f"a bucket of {bucket.numel} elements was given a tensor of shape {tuple(flat.shape)}"
            )
        if shards is not None and (len(shards) != self.transport.size or sum(shards) != bucket.numel):
            raise CompressionError(
                f"shards {list(shards)} do not cover {bucket.numel} elements on {self.transport.size} ranks"
            )
        if bucket.role == "gradient" and bucket.direction != self.config.direction:
            raise CompressionError(
                f"a bucket of direction {bucket.direction.kind!r} is not one of the configuration's, "
                f"{self.config.direction.kind!r}"
            )
        if shards is not None and bucket.direction.shared:
            raise UnsupportedError(
                f"direction: {bucket.direction.kind} needs the whole average on every rank, not a shard of it: use "
                "direction: gradient, or an all-reduce"
            )
        if shards is not None and self.config.levels is not None:
            raise UnsupportedError(
                f"levels: {self.config.levels}: ranks of a node share out the whole average; where each rank keeps a "
                "shard of it (ZeRO 1 to 3) remove the key"
            )
        if bucket.role == "gradient":
            self._dense += bucket.dense_bytes(self.transport.size)
        judged = self.health.sends(bucket, flat) if self.health.on else False
        work = self.engine.run(self._program(bucket, flat, shards, absent, exact, around))
        if judged:
            work.then(lambda average: self.health.gets(average, shards))
        return work

    def host_would_send(self, nbytes: float) -> None:
        """Count bytes of gradients that do not travel in this step, as ranks train by themselves."""
        self._dense += nbytes

    def judge(self) -> None:
        """All gradients of a backward pass are reduced; every rank calls it at the same point.

        Raises:
            NonFiniteError: one is not finite, and `on_nonfinite` is `raise`. Where it is `skip`, `health.ill` says so.
        """
        if self.health.on:
            self.health.judge(self.step, self.transport.rank == 0)

    def reduce(self, bucket: Bucket, flat: Tensor, shards: Sequence[int] | None = None) -> Tensor:
        """`start`, then wait for the average, [bucket.numel]. Arguments and errors as there."""
        return self.start(bucket, flat, shards).result()

    def progress(self) -> None:
        """Advance what is ready, without blocking."""
        self.engine.progress()

    def drain(self) -> None:
        """Wait until every reduction that was started is done."""
        self.engine.drain()

    def abort(self) -> None:
        """Forget what is in flight, and what the step has changed, after an error or a rollback of the host."""
        self.engine.abort()
        self.drop()

    def drop(self) -> None:
        """The gradients of this step are thrown away, before any optimizer has seen them: as if they had not been."""
        self._uses.clear()
        self.ledger.drop()
        self.health.clear()
        self.state.rollback()

    def keep(self) -> None:
        """What reductions have changed in the state since the last step is kept, outside of a step."""
        self._uses.clear()
        self.engine.settle()
        self.state.commit()

    def end_step(self, skipped: bool = False) -> None:
        """Call once after each optimizer step: what it changed in the state is kept, and `step` grows by one. A skipped
        step leaves no trace and does not count.
        """
        if skipped:
            self._uses.clear()
            self.ledger.drop()
            self.engine.settle()
            self.state.rollback()
        else:
            self.keep()
            if not self.warming:
                self.ledger.end_step()
            self.step += 1
        self.health.clear()
        if self.telemetry is not None:
            self.telemetry.step(self._counters(skipped))
        self._dense, self.beside, self._cosine = 0.0, 0.0, Cosine()

    def state_dict(self) -> dict[str, Any]:
        """As of the last step that is done. Plain dicts, numbers and tensors; loads with
        `torch.load(..., weights_only=True)`. Differs on every rank.
        """
        own = {"version": STATE_VERSION, "step": self.step, "size": self.transport.size, "node": self.node}
        lengths = {name: p.numel() for name, p in self.parameters.items()}
        return {**own, **self.state.state_dict(lengths)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue, bit for bit, from `state_dict()` of the same rank; for another number of ranks use `reshard`
        first.

        Raises:
            CompressionError: a state of another version.
        """
        if saved.get("version") != STATE_VERSION:
            raise CompressionError(
                f"compression state of version {saved.get('version')!r} is unknown; this package reads "
                f"{STATE_VERSION}. Start without it: the residuals begin at zero"
            )
        self.abort()
        self.step = int(saved["step"])
        self.state.load_state_dict(saved)
        self._saved_node = saved.get("node", 1) if saved["vectors"] else EVERY
        if self._formed:
            self._check_parts()

    def _program(
        self,
        bucket: Bucket,
        flat: Tensor,
        shards: Sequence[int] | None,
        absent: frozenset[str],
        exact: bool,
        around: Callable[[Reduction, Call], Reduction] | None,
    ) -> Reduction:
        """The life of one reduction: the direction, inside it the scheme's own program, and its end."""
        use = self._uses[bucket.id] = self._uses.get(bucket.id, -1) + 1
        if not bucket.numel:
            return flat
        direction = GRADIENT if exact else bucket.direction
        scheme = NoCompression() if exact else self.scheme_of(bucket)
        # With shared moments a rank without a gradient has something to say all the same.
        absent = frozenset() if direction.shared else absent | self._zeros.names(bucket, flat)
        slots = CallSlots(self.state, bucket, bucket.role, absent)
        view = self.transport.scoped(f"{bucket.id:08x}")
        if isinstance(view, Verified):
            view.about = f"the bucket of {bucket.segments[0].name!r}"
        before = view.typical
        sample = flat.clone() if self._compares(bucket, shards, exact) else None
        call = Call(
            transport=view,
            key=Key(self.config.seed, bucket.id, self.step, self.transport.rank, stream(Purpose.ENCODE, use)),
            clock=Clock(self.step, use, (self.step - self.config.warmup_steps) // self.config.every),
            segments=bucket.segments,
            shards=shards,
            state=slots,
            role=bucket.role,
            absent=absent,
            weights=partial(_weights, bucket, self.parameters) if self.parameters else None,
        )
        rounds = call.clock.round - direction.exact_rounds(call.clock.round)  # of the scheme itself
        scheme_call = replace(call, clock=call.clock._replace(round=rounds))
        beside = 0.0

        def average(own: Scheme, x: Tensor, call: Call) -> Reduction:
            result = yield from averaged(own, x, call)
            if direction.shared and own.memory:
                restore_unless(finite(result), call.residual())  # also where the bad gradient was another rank's
            return result

        def run(x: Tensor, exact: bool) -> Reduction:
            nonlocal beside
            own = NoCompression() if exact else scheme
            if self.levels is None or own.host_dense:
                return (yield from average(own, x, scheme_call))
            across = partial(self._across, bucket, scheme_call, partial(average, own))
            result, beside = yield from self.levels.mean(bucket, x, across)
            return result

        try:
            program = direction.mean(flat, call, run)
            result = yield from (around(program, call) if around else program)
            if not self.warming:
                self.ledger.book(bucket, view.typical - before + beside, shards is not None)
            if sample is not None:
                self._cosine.add(result, (yield view.all_reduce(sample)))
            return result
        finally:
            slots.close()

    def _across(
        self, bucket: Bucket, call: Call, average: Callable[[Tensor, Call], Reduction], x: Tensor, transport: Transport
    ) -> Reduction:
        """`x`, the node's mean of what this rank owns of a bucket, averaged over nodes."""
        assert self.levels is not None
        part = self.levels.part(bucket)
        absent = self._zeros.names(part, x) if x.is_cpu and not part.direction.shared else call.absent
        slots = CallSlots(self.state, part, part.role, absent, parts=True)
        key = call.key._replace(tensor=part.id, rank=transport.rank)
        own = replace(call, transport=transport, key=key, segments=part.segments, state=slots, absent=absent)
        try:
            result = yield from average(x, own)
            if part.scheme.memory:
                for place in self.levels.filling(bucket):
                    own.residual().new[place] = 0
            return result
        finally:
            slots.close()

    def _compares(self, bucket: Bucket, shards: Sequence[int] | None, exact: bool) -> bool:
        """Whether the dense average of `bucket` travels as well in this step, for telemetry; on every rank alike."""
        every = self.config.cosine_every
        compressed = not (exact or self.scheme_of(bucket).host_dense or bucket.direction.formed)
        return bool(every) and self.step % every == 0 and compressed and shards is None and bucket.role == "gradient"

    def _counters(self, skipped: bool) -> Counters:
        return Counters(
            step=self.step,
            sent=self.transport.sent,
            dense=self._dense + self.beside,
            norm=self.state.norm,
            state_bytes=self.state.nbytes(),
            seconds=self.engine.seconds,
            skipped=skipped,
            cosine=self._cosine.value(),
        )


def _weights(bucket: Bucket, parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([parameters[segment.name].detach().reshape(-1).float() for segment in bucket.segments])
