"""Local updates: ranks train by themselves for some steps, then average how far their weights have drifted.

Local SGD (Stich, 2019, arXiv 1805.09767), and with an outer optimizer DiLoCo (Douillard et al., 2023, arXiv
2311.08105); the drift goes through a compression scheme with its memory, as in SparseLoCo (Sarfi et al., 2025, arXiv
2508.15706).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .._lazy import torch
from .hooks import StepHook

if TYPE_CHECKING:
    from torch import Tensor


class Outer(NamedTuple):
    """What becomes of the mean drift d: b <- momentum b + d, and the weights are the anchor minus lr b, or with
    nesterov minus lr (d + momentum b).

    Attributes:
        lr, momentum, nesterov: as of `torch.optim.SGD`; 1, 0 and False are plain averaging.
        moments: `"mean"` also averages what the script's optimizer keeps for each element, exactly.
    """

    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False
    moments: str = "local"


class Exchange(Protocol):
    """How vectors, one for each parameter, become their means over ranks."""

    def local(self) -> bool:
        """Whether ranks train by themselves in this step."""
        ...

    def due(self) -> bool:
        """Whether a round ends with this step."""
        ...

    def names(self) -> Sequence[str]:
        """Parameters that are averaged."""
        ...

    def start(self, drifts: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], veto: str) -> list[Any]:
        """Begin to replace `drifts` by what the schemes make of their mean, or where some rank has a veto by the mean
        of the parameters themselves; and each of `moments` by its mean. What is on its way, for who drives many ranks.

        Args:
            veto: name of a parameter that the script has written to, or "".
        """
        ...

    def finish(self) -> bool:
        """Wait for it; False where some rank had a veto."""
        ...


class LocalUpdates(StepHook):
    """A `StepHook`: between exchanges the parameters of each rank are its own; an exchange makes them the same bits.

    The anchor is what all ranks agreed on last. A round begins with it, at the first forward pass or optimizer step
    after an exchange: whatever a script writes to the weights until then belongs to it. Whoever reads the weights
    during a round, to evaluate or to save, sees the anchor, the same on every rank; training goes on where it was. Only
    between a forward pass and its backward pass the weights stay what they are.

    A script that writes to the weights in the middle of a round (it loads others, or sets a row to zero) cannot wait
    for a coded drift to bring that about: the exchange that follows averages the weights themselves, exactly, and until
    then readers see this rank's own. Writes are noticed by torch's version counters, which `p.data` does not have: what
    is written through `p.data` in the middle of a round counts as training. We ourselves write through it.

    Keeps for each parameter its anchor, its drift, and with an outer momentum that: fp32 each, fp64 of fp64 parameters;
    and while the anchor is shown this rank's own weights.

    Args:
        outer: the outer optimizer.
        parameters: by name; it may grow.
        exchange: the way to the other ranks.
    """

    def __init__(self, outer: Outer, parameters: Mapping[str, Tensor], exchange: Exchange) -> None:
        self.outer, self._parameters, self._exchange = outer, parameters, exchange
        self._anchors: dict[str, Tensor] = {}
        self._drifts: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}  # this rank's weights, while the parameters hold the anchor
        self._open = False  # a round has begun
        self._computing = False  # between a forward pass and its backward pass
        self._edited = ""  # a parameter that the script has written to since the round began
        self._doubt = False  # nobody knows whether ranks begin the next round with the same weights
        self._versions: dict[str, int] = {}

    # -- between exchanges

    def before_forward(self) -> None:
        """Training goes on: a round begins, or this rank's own weights come back."""
        self._go_on()
        self._computing = True

    def after_backward(self) -> None:
        """The same before an optimizer's step, for a model that is not watched."""
        self._computing = False
        self._go_on()
        self._notice()

    @torch.no_grad()
    def before_read(self) -> None:
        """Show the anchor, until training goes on."""
        if not self._open or self._own or self._computing:
            return
        self._notice()
        if self._edited:
            return
        self._own = {name: self._parameters[name].detach().clone() for name in self._live()}
        self._show([self._anchors[name] for name in self._own])

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, parameters hold the anchor; afterwards they are what they were."""
        was, computing = bool(self._own), self._computing
        self._computing = False
        self.before_read()
        try:
            yield
        finally:
            if not was:
                self._come_back()
            self._computing = computing

    def stepped(self) -> None:
        """An optimizer has written to the parameters: no script has."""
        self._versions = {name: p._version for name, p in self._parameters.items()}

    def _go_on(self) -> None:
        self._come_back()
        if self._exchange.local():
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        fresh = [name for name in self._exchange.names() if not self._open or name not in self._anchors]
        if not fresh:
            return
        self._notice()
        for name in fresh:
            p = self._parameters[name]
            anchor = self._anchors.get(name)
            if anchor is None or anchor.shape != p.shape:
                self._anchors[name] = p.detach().to(_wide(p.dtype), copy=True)
            elif p.dtype == anchor.dtype:
                anchor.copy_(p)
            else:  # what rounding to the parameter's dtype took away is still known, where the script wrote nothing
                torch.where(anchor.to(p.dtype) == p, anchor, p.float(), out=anchor)
        if not self._open:
            self._open, self._edited, self._doubt = True, fresh[0] if self._doubt else "", False
        self.stepped()

    @torch.no_grad()
    def _come_back(self) -> None:
        """From the anchor to this rank's own weights. What the script wrote meanwhile stays written."""
        own, self._own = self._own, {}
        if not own:
            return
        self._notice()
        for name, weights in own.items():
            p = self._parameters[name].data
            torch.where(p == self._anchors[name].to(p.dtype), weights, p, out=p)

    def _live(self) -> list[str]:
        return [name for name in self._exchange.names() if name in self._anchors]

    def _show(self, weights: Sequence[Tensor]) -> None:
        torch._foreach_copy_([self._parameters[name].data for name in self._live()], list(weights))

    def _notice(self) -> None:
        """Whether the script has written to the weights since we last looked."""
        if self._open:
            before = self._versions
            self.stepped()
            moved = (name for name, version in self._versions.items() if version != before.get(name, version))
            self._edited = self._edited or next(moved, "")

    # -- the exchange

    def after_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Step number `step` is done: exchange if a round ends with it."""
        self.stepped()
        if self._exchange.due():
            self.exchange(optimizer)

    def exchange(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """End the round here, on every rank alike."""
        self.start_exchange(optimizer)
        self.finish_exchange()

    @torch.no_grad()
    def start_exchange(self, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
        """The drift of this rank leaves; what is on its way."""
        self._computing = False
        self._go_on()
        self._notice()
        for name in self._live():
            p, anchor = self._parameters[name], self._anchors[name]
            drift = self._drifts.get(name)
            if drift is None or drift.shape != p.shape:
                drift = self._drifts[name] = torch.empty_like(anchor)
            torch.sub(anchor.to(p.dtype).to(anchor.dtype), p.to(anchor.dtype), out=drift)
        moments = self._moments(optimizer) if self.outer.moments == "mean" and optimizer is not None else {}
        return self._exchange.start({name: self._drifts[name] for name in self._live()}, moments, self._edited)

    @torch.no_grad()
    def finish_exchange(self) -> None:
        """Take the outer step; the parameters of all ranks are equal bit for bit."""
        live = self._live()
        anchors, drifts = ([kept[name] for name in live] for kept in (self._anchors, self._drifts))
        if self._exchange.finish():
            torch._foreach_sub_(anchors, self._outer_step(live, drifts), alpha=self.outer.lr)
        else:  # the mean of the weights themselves, which may be others than those that the momentum is of
            torch._foreach_copy_(anchors, drifts)
            self._momentum.clear()
        self._show(anchors)
        self._open, self._edited = False, ""

    def _outer_step(self, live: Sequence[str], drifts: list[Tensor]) -> list[Tensor]:
        if not self.outer.momentum:
            return drifts
        for name, drift in zip(live, drifts):
            if name not in self._momentum:
                self._momentum[name] = torch.zeros_like(drift)
        momenta = [self._momentum[name] for name in live]
        torch._foreach_mul_(momenta, self.outer.momentum)
        torch._foreach_add_(momenta, drifts)
        if not self.outer.nesterov:
            return momenta
        torch._foreach_add_(drifts, momenta, alpha=self.outer.momentum)
        return drifts

    def _moments(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """What the optimizer keeps for each element, by its name for it, in one order on every rank."""
        kept: dict[str, dict[str, Tensor]] = {}
        for name in self._live():
            p = self._parameters[name]
            for key, value in optimizer.state.get(p, {}).items():
                alike = torch.is_tensor(value) and value.shape == p.shape and value.device == p.device
                if alike and value.is_floating_point() and key != "step":
                    kept.setdefault(key, {})[name] = value
        return {key: kept[key] for key in sorted(kept)}

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """The anchor and this rank's own weights in the middle of a round, and the outer momentum."""
        state: dict[str, Any] = {"momentum": {name: m.clone() for name, m in self._momentum.items()}}
        if self._open:
            own = self._own or self._parameters
            state["anchors"] = {name: self._anchors[name].clone() for name in self._live()}
            state["own"] = {name: own[name].detach().clone() for name in self._live()}
            state["edited"] = self._edited
        return state

    def new_ranks(self, first: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
        """The round goes on: old ranks keep how far they have drifted, new ones begin at the anchor, which the host has
        given them as their weights. The outer momentum, the same on all old ranks, is theirs too.
        """
        self._momentum = first(self._momentum)

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """After the weights themselves are loaded. From `{}`, the next exchange averages weights exactly: nobody knows
        whether they are the same on every rank.
        """
        self._come_back()
        self._momentum, self._anchors = (
            {
                name: kept.to(self._parameters[name].device, copy=True)
                for name, kept in saved.get(key, {}).items()
                if name in self._parameters
            }
            for key in ("momentum", "anchors")
        )
        self._open, self._edited = bool(self._anchors), str(saved.get("edited", ""))
        self._doubt = not saved
        for name in self._anchors:
            self._parameters[name].data.copy_(saved["own"][name])
        self.stepped()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which differences of parameters of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32
