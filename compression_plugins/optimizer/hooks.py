"""What happens around an optimizer's step, beside the reduction of gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StepHook:
    """Quantized weights, local updates: something that acts on the parameters once per step, on every rank alike.

    A host calls `before_forward` when ranks are about to compute gradients, `after_backward` when they have,
    `after_step` when the optimizer has stepped, and `before_read` when the script evaluates or saves the model. In
    between parameters are the script's: whoever reads, saves or edits them outside forward and backward sees exact
    ones. A hook overrides what it needs; here nothing happens.
    """

    def before_forward(self) -> None:
        """Parameters become what gradients are computed at. Called again before `after_backward`, it does nothing."""

    def after_backward(self) -> None:
        """Parameters become exact again, for the optimizer's step. Harmless when they are."""

    def before_read(self) -> None:
        """Parameters become those by which the job is judged, the same on every rank, until gradients are computed or
        the optimizer steps again. Harmless when they are.
        """

    def after_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Optimizer step number `step`, from 0, is done by `optimizer`. Reductions that the hook makes now belong to
        this step.
        """

    def exact(self) -> AbstractContextManager[None]:
        """A context in which parameters are those by which the job is judged, as for a checkpoint; afterwards they are
        what they were.
        """
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """What the hook remembers, as plain dicts, numbers and tensors."""
        return {}

    def new_ranks(self, first: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
        """Other ranks take part from now on, with the same parameters; here everything begins anew on all of them.

        Args:
            first: on every rank gives the tensors that the first of the old ranks passes; all call it as often.
        """
        self.load_state_dict({})

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Call after the parameters themselves are loaded; `{}` begins anew."""
