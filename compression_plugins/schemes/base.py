"""What a scheme is: a frozen description of how the average of one bucket travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.call import Call, Reduction, Segment, total
from ..core.memory import Memory
from ..errors import UnsupportedError
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from ..codecs import Codec
    from ..collectives import Collective
    from ..optimizer.hooks import StepHook
    from ..optimizer.weight_law import WeightLaw

#: What a host may ask of a scheme, each a method of the same name.
Operation = Literal["mean", "scatter_mean", "gather", "mix"]
_OF_A_CODEC: frozenset[Operation] = frozenset(("mean", "scatter_mean", "gather", "mix"))
_OF_ITS_OWN: frozenset[Operation] = frozenset(("mean",))

#: Elements that share a scale.
Block = Annotated[int, Field(ge=32, le=1 << 24, multiple_of=32)]


class Scheme(BaseModel):
    """Base of all schemes. Fields are the parameters that a configuration may set.

    A scheme made of parts names a `codec`, a `memory` and a `collective`, and has all operations by that; one that does
    more overrides `mean`, and states in `operations` what else it has.

    Attributes:
        name: the word that selects it.
        paper: authors, year, arXiv id.
        sums_only: every collective is an all-reduce, so ranks that have left (`hvd.join`) may add zeros.
        host_dense: nothing is compressed; a host keeps its own path, and tensors their own dtype.
        trains: False for what only measures time.
        lossless: weights, where they travel, end as the very bits of their owner; changes travel as patches.
        suits_adam: False where gradients sent by it in each step do not reach the loss of dense training under Adam
            (docs/benchmarks/parity.md); a session says so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: ClassVar[str]
    paper: ClassVar[str]
    sums_only: ClassVar[bool] = False
    host_dense: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    lossless: ClassVar[bool] = False
    suits_adam: ClassVar[bool] = True

    @property
    def codec(self) -> Codec | None:
        """How values become a payload; None for a scheme with a `mean` of its own."""
        return None

    @property
    def memory(self) -> Memory | None:
        """Law of the residual; None for a scheme that remembers nothing."""
        return None

    @property
    def collective(self) -> Collective:
        """How payloads meet. Without a memory the codec is unbiased, or so fine that rounding twice is harmless, and
        they may meet in two stages.
        """
        from ..collectives import GATHER, TWO_STAGE

        return GATHER if self.memory else TWO_STAGE

    @property
    def period(self) -> int:
        """Rounds after which what is sent repeats itself; the mean over them is what `wire_bits` says."""
        return 1

    @property
    def says_zero(self) -> bool:
        """False where a code has no word for 0, as a sign has none. What is zero on every rank is then told beside the
        message, one bit per row, and stays zero; `engine.marks` does it for the scheme.
        """
        return True

    @property
    def operations(self) -> frozenset[Operation]:
        """What this scheme can do; a host that needs more refuses it at start-up."""
        return _OF_ITS_OWN if self.codec is None else _OF_A_CODEC

    @property
    def weight_law(self) -> WeightLaw | None:
        """How the weights are quantized that ranks compute with; None: they are not."""
        return None

    def step_hook(self, parameters: Mapping[str, Tensor], seed: int) -> StepHook | None:
        """What happens around the optimizer's step to those parameters whose gradients this scheme averages.

        Args:
            parameters: by name; every rank holds the whole of each.
            seed: of the configuration.
        """
        return None

    def check_ranks(self, size: int) -> None:
        """Called at start-up; raises `UnsupportedError`, with the nearest valid choice, if `size` ranks are wrong."""

    def mean(self, x: Tensor, call: Call) -> Reduction:
        """Average flat fp32 `x` over ranks. `x` may be overwritten, and may be what is returned."""
        return (yield from self.collective.mean(self._codec("mean"), self.memory, call, x))

    def scatter_mean(self, x: Tensor, call: Call) -> Reduction:
        """The same where each rank needs only the shard that it owns (`call.shards`); the rest of the result has no
        meaning.
        """
        from ..collectives import scatter_mean

        return (yield from scatter_mean(self._codec("scatter_mean"), self.memory, call, x))

    def gather(self, x: Tensor, call: Call) -> Reduction:
        """What every rank holds, from the own shard `x` of each (`call.shards`): flat fp32, all shards in rank order,
        the same bits on every rank.
        """
        from ..collectives import gather_shards

        return (yield from gather_shards(self._codec("gather"), self.memory, call, x))

    def mix(self, x: Tensor, call: Call, weights: Mapping[int, float]) -> Reduction:
        """Weighted mean of this rank's vector and of those of its neighbours on the ring of ranks.

        Args:
            weights: offset -> weight, the same on every rank; see `collectives.mix`.
        """
        from ..collectives import mix

        return (yield from mix(self._codec("mix"), self.memory, call, x, weights))

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        """Bits that each of `size` ranks sends, the mean over ranks and steps, to average a bucket of `segments` once.

        Known from the collective for a scheme made of a codec, traced for any other; a scheme whose traffic changes
        from step to step, or that is asked for at many ranks, overrides this with a formula.
        """
        if self.codec is not None:
            return self.collective.bits(self.codec, total(segments), size)
        from .trace import traced_bits

        return traced_bits(self.mean, segments, size)

    def scatter_bits(self, segments: Sequence[Segment], size: int) -> float:
        """The same for `scatter_mean`: every rank sends each of the others its shard."""
        return self._codec("scatter_mean").payload_bits(total(segments)) * (size - 1) / size

    def _codec(self, operation: Operation) -> Codec:
        """What an operation is made of.

        Raises:
            UnsupportedError: this scheme does not have the operation.
        """
        codec = self.codec
        if codec is None or operation not in self.operations:
            has = ", ".join(sorted(self.operations))
            raise UnsupportedError(f"scheme {self.name!r} cannot {operation}; what it can do: {has}")
        return codec


@register
class NoCompression(Scheme):
    """No compression: the control, and the way of exempt tensors.

    A dense all-reduce of the values themselves, in their own dtype.
    """

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "-"
    sums_only: ClassVar[bool] = True
    host_dense: ClassVar[bool] = True

    def mean(self, x: Tensor, call: Call) -> Reduction:
        from ..collectives import dense_mean

        return (yield from dense_mean(call, x))

    @property
    def operations(self) -> frozenset[Operation]:
        return frozenset(("mean", "scatter_mean"))

    def scatter_mean(self, x: Tensor, call: Call) -> Reduction:
        shards = list(call.shards or ())
        mine = x.split(shards)[call.transport.rank]
        mine.copy_((yield call.transport.reduce_scatter(x, shards)).div_(call.transport.size))
        return x

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        return 64 * total(segments) * (size - 1) / size

    def scatter_bits(self, segments: Sequence[Segment], size: int) -> float:
        return self.wire_bits(segments, size) / 2
