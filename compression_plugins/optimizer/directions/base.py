"""What a direction is: a stage around the scheme's program, which says what that program averages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.call import Call, Reduction

Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Decay, Decay], Field(strict=False)]
Eps = Annotated[float, Field(gt=0, le=1)]
Steps = Annotated[int, Field(ge=1, le=10**9)]


class Run(Protocol):
    """Averages a bucket over ranks, for a direction."""

    def __call__(self, x: Tensor, exact: bool) -> Reduction:
        """The mean of flat fp32 `x`, which may be overwritten and may be what is returned.

        Args:
            exact: by a dense sum and without a trace in the state. Otherwise by the bucket's scheme, with its memory
                and its marks of zeros; that of an exempt tensor, or in the warm-up, is exact too.
        """
        ...


class Direction(BaseModel):
    """Base of all directions. Fields are the parameters that a configuration may set.

    Attributes:
        kind: the word that selects it.
        formed: False for the gradient itself, which a host may also send as it is, in its own dtype and scale.
        moments: fp32 values that it keeps of each element.
        shared: every rank keeps the same moments, the same bits, so each needs the whole of every average.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: str
    formed: ClassVar[bool] = True
    moments: ClassVar[int] = 2
    shared: ClassVar[bool] = False

    def check(self, warmup_steps: int) -> None:
        """Called when a configuration is read; raises `ConfigError` if it cannot begin after that many dense steps."""

    def exact_rounds(self, rounds: int) -> int:
        """Of the first `rounds` steps after the warm-up, those that are averaged exactly by this direction's wish."""
        return 0

    @property
    def exact_share(self) -> float:
        """The part of such steps in the long run."""
        return 0.0

    def mean(self, x: Tensor, call: Call, run: Run) -> Reduction:
        """What the ranks' gradients become.

        Args:
            x: flat fp32 [numel], this rank's gradient of a bucket, in units of the unscaled loss; may be overwritten.
            call: as a scheme gets it.
            run: averages over ranks; to be called once.

        Returns:
            Flat fp32 [numel], the same bits on every rank; not finite where some rank's gradient is not. The moments
            then stay as they were.

        Raises:
            UnsupportedError: the host reduces the bucket more than once in a step.
        """
        raise NotImplementedError


class Gradient(Direction):
    """The gradient itself; the script's optimizer follows the average."""

    kind: Literal["gradient"] = "gradient"
    formed: ClassVar[bool] = False
    moments: ClassVar[int] = 0

    def mean(self, x: Tensor, call: Call, run: Run) -> Reduction:
        return (yield from run(x, False))


GRADIENT = Gradient()


def once_in_a_step(call: Call) -> None:
    """Refuse the second reduction of a bucket within one step."""
    if call.clock.micro_batch:
        raise UnsupportedError(
            "a direction other than the gradient takes one gradient per step, but this host reduces every micro-batch: "
            "with DeepSpeed and gradient accumulation use ZeRO stage 0 or 1; else direction: gradient"
        )
