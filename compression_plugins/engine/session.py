"""What every host's adapter has in common: one model's or optimizer's compressed reduction, from start-up to state."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from .._version import __version__
from ..config import Config, presets
from ..errors import UnsupportedError
from ..optimizer.hooks import StepHook
from ..optimizer.local_updates import LocalUpdates, Outer
from ..optimizer.plain import check_plain
from ..transports.base import Transport
from . import loss_scale, patterns
from .differences import differences
from .exchange import UpdateExchange
from .ledger import Ledger
from .notice import announce, warn
from .plan import Plan, TensorSpec, make_plan
from .preload import preload
from .reducer import Reducer
from .replicas import compare
from .saved import STATE_VERSION, Judged, judge, seal
from .telemetry import Telemetry

#: Numbers the sessions of a group of ranks in the order of their first use.
_uses: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


@dataclass
class _Tally:
    """What a session has done, for the one line at its end."""

    host: str
    scheme: str
    speaks: bool = False
    ranks: str = ""
    steps: int = 0
    dense: float = 0.0
    sent: float = 0.0
    exposed_s: float = 0.0
    ledger: Ledger | None = None
    reductions: int = 1

    def report(self) -> None:
        if self.speaks and self.steps:
            announce(
                f"{self.host}: {self.scheme}, {self.steps} steps on {self.ranks}: "
                f"{self.sent / self.steps / 1e6:.3f} MB sent per step and rank "
                f"(dense {self.dense / self.steps / 1e6:.3f} MB, {self.dense / max(self.sent, 1):.1f}x), "
                f"{1e3 * self.exposed_s / self.steps:.2f} ms of communication exposed per step"
            )
            fault = self.ledger.report(self.reductions) if self.ledger is not None else ""
            if fault:
                warn(f"{self.host}: {fault}")


class Session:
    """The compressed reduction of some named parameters on one rank.

    A host's adapter says which parameters there are, opens the session when every rank is there to compare notes, hands
    gradients to `reducer`, and tells when an optimizer step is over or its gradients were dropped.

    Args:
        host: its name, as messages begin.
        config: what to do.
        parameters: those whose gradients are reduced, by name, in registration order.
        frozen: names of parameters that have no gradient yet; patterns may match them.
        speaks: whether this rank is the one that prints.
        group: tells the ranks that take part from other groups of ranks in the same job.
        gathers: whether weights travel from owners to all ranks, which `parameters` is about.

    Raises:
        UnsupportedError: a parameter cannot be reduced, or `parameters` is set and weights do not travel.

    Attributes:
        name: unique in the process and the same on every rank, for sessions are first used in one order everywhere;
            those that some rank makes and never uses do not count. Were names made of tensors, ranks whose tensors
            differ would never meet to find out.
        plan: which tensor travels how.
        hooks: what happens around the optimizer's step.
        reductions: of each bucket within one step.
    """

    def __init__(
        self,
        host: str,
        config: Config,
        parameters: Mapping[str, Tensor],
        frozen: Sequence[str] = (),
        speaks: bool = True,
        group: str = "all",
        gathers: bool = False,
    ) -> None:
        if config.parameters is not None and not gathers:
            raise UnsupportedError(
                f"{host} compression: parameters: {config.parameters.name} is about weights that travel from owners to "
                "all ranks, as under ZeRO 1 to 3, and here none do: remove the key"
            )
        self._group = group
        self.host, self.config, self.parameters = host, config, dict(parameters)
        for name, p in self.parameters.items():
            if not p.is_floating_point():
                raise UnsupportedError(
                    f"{host} compression: {name!r} is {p.dtype}; only real floating point is reduced"
                )
        loss_scale.watch()
        if config.every > 1:
            loss_scale.share(self)
        patterns.note(config, [*self.parameters, *frozen], speaks)
        self.plan = make_plan(config, self.specs(self.parameters))
        self.hooks: list[StepHook] = []
        self._local_updates: LocalUpdates | None = None
        self._finished = -1  # the step at which a last round was exchanged
        self._makes_hooks = self._compares = False
        self.reductions = 1
        self._speaks, self._warned = speaks, False
        self._reducer: Reducer | None = None
        self._telemetry: Telemetry | None = None
        self._earlier = (0.0, 0.0)  # bytes and seconds of reducers before this one
        self._tally = _Tally(host, config.scheme.name)
        weakref.finalize(self, self._tally.report)  # at the end of the process, too

    # -- start-up

    @cached_property
    def name(self) -> str:
        """Made at its first use, so in the order in which sessions are opened."""
        return f"compression_plugins.{self._group}.{next(_uses[self._group])}"

    @staticmethod
    def specs(parameters: Mapping[str, Tensor]) -> list[TensorSpec]:
        """What a plan needs to know of them."""
        return [
            TensorSpec(name, tuple(p.shape), str(p.dtype).removeprefix("torch."), str(p.device))
            for name, p in parameters.items()
        ]

    def facts(self) -> dict[str, Any]:
        """What all ranks must have in common, beside `tensors`; JSON-able."""
        return {"version": __version__, "config": self.config.to_dict()}

    def tensors(self) -> dict[str, Any]:
        """What all ranks must have in common of each tensor; JSON-able. How parameters spread over devices shapes the
        buckets; which devices these are does not.
        """
        devices: dict[str, int] = {}
        return {
            spec.name: [i, spec.dtype, list(spec.shape), devices.setdefault(spec.device, len(devices))]
            for i, spec in enumerate(self.specs({row.name: self.parameters[row.name] for row in self.plan.rows}))
        }

    def preload(self, rank: int, size: int, sharded: bool = False) -> None:
        """Compile and load what the first steps will run, before they do; refuse what cannot run on `size` ranks."""
        self.config.check_ranks(size)
        node = self.config.levels if isinstance(self.config.levels, int) else 1
        if size > node:
            preload(self.config, self.plan, rank // node, size // node, sharded)

    def check_optimizer(self, optimizer: Any) -> None:
        """Call before `optimizer`, which holds parameters of this session, takes its first step.

        Raises:
            UnsupportedError: the configuration has the optimizer's work before the average, and this one would repeat
                it.
        """
        if self.config.every > 1 and any(c.__name__ == "ZeroRedundancyOptimizer" for c in type(optimizer).__mro__):
            raise UnsupportedError(
                f"{self.host} compression: every: {self.config.every} lets each rank take steps by itself, and "
                "ZeroRedundancyOptimizer shards the optimizer: use the optimizer inside of it, or set every to 1"
            )
        if self.config.direction.formed:
            check_plain(optimizer, f"{self.host} compression: direction: {self.config.direction.kind}")
        elif self.config.every == 1 and "betas" in getattr(optimizer, "defaults", {}) and self._speaks:
            names = sorted({row.scheme.name for row in self.plan.rows if not row.scheme.suits_adam})
            if names and not self._warned:
                warn(
                    f"{self.host}: with {type(optimizer).__name__}, gradients sent by {' and '.join(names)} did not "
                    "reach the loss of dense training on a transformer (docs/benchmarks/parity.md); presets made for "
                    f"it: {', '.join(presets())}"
                )
            self._warned = True

    def start(self, transport: Transport) -> None:
        """Make the reducer over the ranks of `transport`, its memory empty; again when the set of ranks has changed."""
        if self._telemetry is None:
            self._telemetry = Telemetry.from_environment(transport.rank)
        self._earlier = (self._tally.sent, self._tally.exposed_s)
        self._reducer = Reducer(self.config, transport, self._telemetry)
        self._reducer.parameters = self.parameters
        self._tally.ranks = "1 rank" if transport.size == 1 else f"{transport.size} ranks"
        self._tally.speaks = transport.rank == 0

    def make_hooks(self) -> None:
        """Make the step hooks of the schemes, for a host whose ranks hold whole parameters."""
        self._makes_hooks, self.hooks = True, self._hooks_of(self.plan)
        if self.config.every > 1:
            outer = Outer(**self.config.outer.model_dump())
            self._local_updates = LocalUpdates(outer, self.parameters, UpdateExchange(self))
            self.hooks.insert(0, self._local_updates)

    def opened(self, where: str = "") -> None:
        """All ranks agree; say what will happen.

        Raises:
            ConfigError: a rule or an exemption matches no tensor of any model in this process.
        """
        patterns.check(self.config)
        self.announce(where)

    def announce(self, where: str = "") -> None:
        """Say what will happen, where a host does so before it knows every model of the job."""
        device = next((p.device for p in self.parameters.values()), "cpu")
        self.reducer.form_levels(device)
        if self._tally.speaks:
            table = self.plan.table(self.reducer.transport.size, self.config.every, self.reducer.node)
            of = f" of direction {self.config.direction.kind}" if self.config.direction.formed else ""
            announce(f"{self.host}: {self.config.scheme.name}{of} on {self._tally.ranks}{where}, {table}")

    def extend(self, parameters: Mapping[str, Tensor]) -> None:
        """Parameters have appeared, on every rank alike: they were unfrozen, or added to the optimizer."""
        self.parameters.update(parameters)
        more = make_plan(self.config, self.specs(parameters))
        self.plan = self.plan.extended(more)
        if self._makes_hooks:
            self.hooks += self._hooks_of(more)
        if self._tally.speaks:
            table = more.table(self.reducer.transport.size, self.config.every, self.reducer.node)
            announce(f"{self.host}: new parameters, {table}")

    def _hooks_of(self, plan: Plan) -> list[StepHook]:
        chosen: dict[Any, dict[str, Tensor]] = {}
        for row in plan.rows:
            chosen.setdefault(row.scheme, {})[row.name] = self.parameters[row.name]
        made = [scheme.step_hook(named, self.config.seed) for scheme, named in chosen.items()]
        return [hook for hook in made if hook is not None]

    @property
    def reducer(self) -> Reducer:
        """What `start` has made; `RuntimeError` before."""
        if self._reducer is None:
            raise RuntimeError("no step has been reduced yet")
        return self._reducer

    @property
    def started(self) -> bool:
        """Whether there is a reducer."""
        return self._reducer is not None

    # -- around the optimizer's step

    def agree(self, optimizer: Any, found_inf: Tensor) -> None:
        """Where ranks train by themselves, they skip a step of a `GradScaler` together: `found_inf` (fp32, 0 or 1)
        becomes 1 if it is on any rank.
        """
        mine = {id(p) for p in self.parameters.values()}
        if not self.started or not self.reducer.local:
            return
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            votes = self.reducer.transport.scoped("found_inf").all_reduce(found_inf.view(1)).wait()
            found_inf.copy_(votes.clamp(max=1).view(()))

    def before_forward(self) -> None:
        """Gradients are about to be computed."""
        for hook in self.hooks:
            hook.before_forward()

    def after_backward(self) -> None:
        """Gradients are computed, or the optimizer is about to step: parameters are exact again."""
        for hook in reversed(self.hooks):
            hook.after_backward()

    def before_read(self) -> None:
        """The script evaluates or saves the model: parameters are those by which the job is judged."""
        for hook in reversed(self.hooks):
            hook.before_read()

    def end_step(self, skipped: bool = False, optimizer: Any = None) -> None:
        """The optimizer has stepped; or not, although it was asked to.

        Args:
            optimizer: whose state an exchange may average; a `torch.optim.Optimizer`.
        """
        reducer = self.reducer
        dense = sum(bucket.dense_bytes(reducer.transport.size) for bucket in self.plan.buckets)
        skipped = skipped or reducer.health.ill
        if reducer.local:
            reducer.host_would_send(dense)
        dense = dense * self.reductions + reducer.beside
        if not skipped and not reducer.warming:
            for hook in reversed(self.hooks):
                hook.after_step(reducer.step, optimizer)
        reducer.end_step(skipped)
        self._tally.steps += 1
        self._tally.dense += dense
        self._book()
        if not skipped:
            self._compare_replicas()

    @property
    def ill(self) -> bool:
        """Whether this step is to be skipped, on every rank alike, for a gradient that is not finite."""
        return self.started and self.reducer.health.ill

    def _compare_replicas(self) -> None:
        """Every `check_every` steps; where ranks train by themselves, at the next exchange."""
        config, step = self.config, self.reducer.step
        self._compares |= bool(config.check_every and step % config.check_every == 0)
        apart = step > config.warmup_steps and (step - config.warmup_steps) % config.every
        if self._compares and not apart and self.reducer.transport.size > 1:
            self._compares = False
            compare(self.parameters, self.reducer.transport, step)

    def _book(self) -> None:
        self._tally.sent = self._earlier[0] + self.reducer.transport.sent
        self._tally.exposed_s = self._earlier[1] + self.reducer.engine.seconds.exposed
        self._tally.ledger, self._tally.reductions = self.reducer.ledger, self.reductions

    def finish(self, optimizer: Any = None) -> None:
        """Training is over, on every rank: exchange what a last, partial round has learned."""
        if self._local_updates is None or not self.started or self.reducer.step == self._finished:
            return
        if self.reducer.local and (self.reducer.step - self.config.warmup_steps) % self.config.every:
            self._local_updates.exchange(optimizer)
            self.reducer.keep()
            self._finished = self.reducer.step
            self._book()

    def other_stepped(self) -> None:
        """An optimizer has stepped some of the parameters, beside the one that ends the step."""
        if self._local_updates is not None:
            self._local_updates.stepped()

    def drop(self) -> None:
        """The script has thrown this step's gradients away."""
        self.reducer.drop()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Inside, parameters are exact, whatever the model computes with."""
        with ExitStack() as stack:
            for hook in reversed(self.hooks):
                stack.enter_context(hook.exact())
            yield

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory, as of the last step that is done, with a checksum. Plain dicts, numbers and tensors."""
        return seal({
            **self.reducer.state_dict(),
            "rank": self.reducer.transport.rank,
            "config": self.config.to_dict(),
            "hooks": [hook.state_dict() for hook in self.hooks],
        })  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state that `judge` gave."""
        self.reducer.load_state_dict(state)
        self.load_hooks(state)

    def judge(self, read: Callable[[], Any], rank: int, size: int) -> Judged:
        """Whether `rank` of `size` can load the state that `read` returns, its own or a list of all ranks'. Ranks
        compare their `standing` before any of them loads. Of one of another scheme only the step is left, aloud.
        """
        judged = judge(read, rank, size, {name: p.numel() for name, p in self.parameters.items()})
        return judged._replace(state=self._fitting(judged.state)) if judged.state else judged

    def forget(self, step: int) -> None:
        """Begin with empty memory, at `step`."""
        self.reducer.load_state_dict({"version": STATE_VERSION, "step": step, "vectors": {}, "tensors": {}})
        self.load_hooks({})

    def _fitting(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """`state`, or without its memory where that is of another scheme; says what has changed since it was saved."""
        changed = differences(state["config"], self.config.to_dict(), here="then", there="now")
        if changed and self._speaks:
            announce(f"{self.host}: the configuration has changed since the state was saved: {'; '.join(changed)}")
        if state["config"]["scheme"] == self.config.scheme.name:
            return state
        if self._speaks:
            announce(f"{self.host}: another scheme cannot use these residuals; they start at zero")
        return {**state, "vectors": {}, "tensors": {}, "hooks": []}

    def load_hooks(self, state: Mapping[str, Any]) -> None:
        """The step hooks' part of it; call after the parameters are loaded."""
        saved = state.get("hooks", [])
        for hook, kept in zip(self.hooks, saved if len(saved) == len(self.hooks) else [{}] * len(self.hooks)):
            hook.load_state_dict(kept)
