"""One DDP model's gradients on their way through the reducer, by DDP's public communication hook.

DDP hands over its own buckets as backward fills them. Their gradients fill the buckets of the plan, which start in the
order of the plan; the hook that brings the last gradient finishes all, and DDP finds averages in its own buffers.

Operations run on the process group of the DDP model. The hooks come in one order on all ranks, so that they are ordered
against DDP's own broadcasts and against the script's collectives just as DDP's all-reduces would be. A group of our own
would be one more collective at start-up, for which ranks outside of `process_group=` would have to come too, and a
second NCCL communicator.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...config import Config
from ...engine.filling import Fillings
from ...engine.notice import announce, warn
from ...engine.saved import Folder, Judged, on_cpu, reader
from ...engine.session import Session
from ...errors import CompressionError, UnsupportedError
from ...transports.torch_distributed import TorchDistributed
from ..shared import forward
from ..shared.forward import after_this_backward, watch_parts
from ..shared.store_handshake import handshake
from .model import hook_of, image, refuse, refuse_join, sparse

_DROPS = 20  # reductions thrown away before any optimizer has stepped, until somebody is told
_MICRO = 1 << 20  # more reductions than a step has
_REMEDY = "Give every rank the same files, and its own compression state of one step or none"
_ABSENT = "compression-plugins is not installed there, it was not given this configuration"

_compressed: weakref.WeakKeyDictionary[Any, Compression] = weakref.WeakKeyDictionary()
_watching: list[Any] = []


def attach(ddp: Any, config: Config, explicit: bool = False) -> None:
    """Compress the gradients of `ddp`, a `DistributedDataParallel`, which has not seen a backward pass yet.

    Args:
        explicit: the script asks for it. Otherwise the hook is registered in the first forward pass only, so that one
            that the script registers meanwhile is found, and left alone.

    Raises:
        CompressionError: the configuration does not fit the model, or DDP was built in a way that has no room for it.
    """
    refuse(ddp)
    earlier = _compressed.get(ddp)
    if explicit and ((earlier is not None and earlier.registered) or hook_of(ddp)):
        raise UnsupportedError(f"DDP compression: this model has a communication hook already, {hook_of(ddp)!r}")
    _watch_optimizers()
    _compressed[ddp] = compression = Compression(ddp, config)
    if earlier is None:
        ddp.register_forward_pre_hook(_before_forward)
    if explicit:
        compression.register(ddp)


def find(model: torch.nn.Module) -> Compression:
    """What compresses `model`: the DDP model itself, one wrapped around it, or one inside.

    Raises:
        UnsupportedError: nothing does.
    """
    for module in model.modules():
        if module in _compressed:
            return _compressed[module]
    theirs = {id(p) for p in model.parameters()}
    for compression in list(_compressed.values()):
        if any(id(p) in theirs for p in compression.session.parameters.values()):
            return compression
    raise UnsupportedError("DDP compression: nothing compresses this model: `compress(model, config)` comes first")


class Compression:
    """The compressed reduction of one DDP model on one rank.

    An optimizer step is over when the first torch optimizer that holds any of these parameters has stepped after a
    reduction; what other optimizers do before the next reduction belongs to the same step. Where the next backward pass
    finds every gradient gone and no optimizer has stepped, the gradients were dropped, and the memory is as if they had
    never been. Where it finds gradients, they are accumulated: reductions go on within the step.

    Args:
        ddp: the model; only a weak reference is kept, for DDP's C++ side keeps this object.
        config: what to do.

    Attributes:
        rank: of this process among those that reduce.
        session: the compressed reduction; starts at the first bucket, when every rank is there to compare notes.
        registered: whether DDP calls us.
    """

    def __init__(self, ddp: DistributedDataParallel, config: Config) -> None:
        self._ddp = weakref.ref(ddp)
        self._group, self._device = ddp.process_group, ddp.device
        self.rank, self._size = dist.get_rank(self._group), dist.get_world_size(self._group)
        named = {
            name.replace("_orig_mod.", ""): p  # of a module compiled before it was wrapped
            for name, p in ddp.module.named_parameters()
            if name not in ddp.parameters_to_ignore
        }
        sparse_ids = sparse(ddp.module)
        reduced = {name: p for name, p in named.items() if p.requires_grad and id(p) not in sparse_ids}
        frozen = [name for name in named if name not in reduced]
        ranks = "-".join(map(str, dist.get_process_group_ranks(self._group)))
        self.session = Session("DDP", config, reduced, frozen, self.rank == 0, f"ddp.{ranks}")
        if self._size > 1:
            self.session.make_hooks()
        if sparse_ids and config.direction.formed:
            raise UnsupportedError(
                f"DDP compression: direction: {config.direction.kind} cannot be formed of embeddings with sparse=True, "
                "whose gradients travel on their own: build them with sparse=False, or use direction: gradient"
            )
        self._names = {id(p): name for name, p in reduced.items()}
        self.registered = False
        self._fillings: Fillings | None = None
        self._given: set[str] = set()
        self._waiting: list[tuple[torch.futures.Future[Tensor], Tensor]] = []
        self._reductions = 0  # since the last step
        self._drops = 0
        self._shadow = False  # the last reduction was of a rank that has left
        self._backward: Any = None  # what notices the beginning of a backward pass
        self._loaded = Judged({}, "none")  # a state that came before the session had started
        self._loads = 0

    def __reduce__(self) -> Any:
        return object, ()  # a copy of a DDP model has a reducer of its own, without a hook

    # -- start-up

    def register(self, ddp: DistributedDataParallel) -> None:
        """Let DDP call us."""
        self.registered = True
        if self._size == 1 and not self.session.config.direction.formed:
            if self.rank == 0:
                announce("DDP: one rank, nothing is communicated or compressed")
            return
        self.session.preload(self.rank, self._size)
        ddp.register_comm_hook(self, reduce_bucket)
        if self.session.hooks:
            watch_parts(self.session, ddp.module)

    def _open(self) -> Fillings:
        session = self.session
        facts = {**session.facts(), "torch": torch.__version__, "tensors": session.tensors()}
        self._agree(session.name, {**facts, "compression state": self._loaded.standing}, _ABSENT)
        session.start(TorchDistributed(self._group))
        if self._loaded.bad:
            raise CompressionError(f"DDP compression: {self._loaded.standing}")
        if self._loaded.state:  # the hooks have theirs
            session.reducer.load_state_dict(self._loaded.state)
        session.opened()
        return Fillings(session.plan, session.reducer)

    # -- during backward

    def take(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Hand over the gradients of one of DDP's buckets (`dist.GradBucket`); the future's value is its buffer, with
        averages.

        It is finished by the bucket that completes the parameters, not by the one that says `is_last()`: in the first
        backward pass of a static graph none does.

        Raises:
            MismatchError: at the first bucket: some rank is about to do something else.
        """
        buffer = bucket.buffer()
        if buffer.is_sparse:
            return self._mean_of_sparse(buffer)
        if self._fillings is None:
            self._fillings = self._open()
        names = [self._names.get(id(p)) for p in bucket.parameters()]
        if not self._given.isdisjoint(names):  # an error ended the pass before this one
            self._abandon()
        joined = self._joined()
        if not self._given and self._joining():
            self._keep_time(joined)
        self._shadow = joined
        device = buffer.device
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[device] if device.type != "cpu" else None)
        self._waiting.append((future, buffer))
        for name, p, gradient in zip(names, bucket.parameters(), bucket.gradients()):
            if name is not None:
                self._fillings.give(name, image(gradient, p, buffer), absent=joined or p.grad is None)
                self._given.add(name)
            elif p.requires_grad:
                raise UnsupportedError(
                    "DDP compression: a parameter was frozen when the model was compressed, and learns now. "
                    "Freeze parameters before DDP is built, or after it is compressed"
                )
        if len(self._given) == len(self._names):
            self._finish(self._fillings)
        return future

    def _finish(self, fillings: Fillings) -> None:
        fillings.collect()
        for future, buffer in self._waiting:
            future.set_result(buffer)
        self._waiting.clear()
        self._given.clear()
        self._reductions += 1

    def _abandon(self) -> None:
        self.session.reducer.abort()
        if self._fillings is not None:
            self._fillings.clear()
        self._waiting.clear()
        self._given.clear()
        self._reductions = 0

    def _mean_of_sparse(self, gradient: Tensor) -> torch.futures.Future[Tensor]:
        """As DDP itself does it, in a bucket for each sparse embedding."""
        work = dist.all_reduce(gradient.div_(self._size), group=self._group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    # -- join(): ranks without data shadow the others, with gradients of zero

    def _joining(self) -> bool:
        ddp = self._ddp()
        return ddp is not None and ddp._join_config.enable

    def _joined(self) -> bool:
        """Whether this rank has left: DDP calls the hook outside of any backward pass."""
        return self._joining() and torch._C._current_graph_task_id() == -1

    def _keep_time(self, joined: bool) -> None:
        """A rank that has left takes no optimizer steps; it learns from the others when they did, for the step seeds
        choices that all ranks share.
        """
        reducer = self.session.reducer
        now = reducer.step * _MICRO + self._reductions
        clock = torch.tensor([-1 if joined else now], device=self._device)
        dist.all_reduce(clock, op=dist.ReduceOp.MAX, group=self._group)
        step, micro = divmod(int(clock), _MICRO)
        if step > reducer.step:
            if self._reductions:
                self.session.end_step()
            reducer.step = step
        elif not micro and self._reductions:
            self.session.drop()
        self._reductions = micro

    # -- around the optimizer's step

    def before_forward(self, training: bool) -> None:
        """A forward pass with gradients begins."""
        if self._joining():
            refuse_join(self.session.config, self._ddp())
        if self._backward is None and (self._reductions or self.session.hooks):
            live = [p for p in self.session.parameters.values() if p.requires_grad]
            self._backward = register_multi_grad_hook(live, self._begin_backward, mode="any")
        if training:
            self.session.before_forward()
        else:
            self.session.after_backward()

    def _begin_backward(self, _: Tensor) -> None:
        """No gradient of this backward pass has been accumulated yet."""
        self._backward.remove()
        self._backward = None
        if self._reductions and all(p.grad is None or not p.grad.any() for p in self.session.parameters.values()):
            self.session.drop()
            self._reductions = 0
            self._drops += 1
            if self._drops == _DROPS and not self.session.reducer.step:
                warn(f"DDP: gradients were dropped {_DROPS} times, and no torch optimizer has stepped these parameters")
        if self.session.hooks:
            after_this_backward(self.session)

    def about_to_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer, perhaps of other parameters, is about to step. At every step, for schedules change momentum."""
        if self._holds(optimizer):
            self.session.check_optimizer(optimizer)
        self.session.after_backward()  # of a forward pass that no backward pass followed
        if self.session.ill and self._holds(optimizer):
            forward.withhold(optimizer)

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer, perhaps of other parameters, has stepped."""
        if not self._holds(optimizer):
            return
        if not self._reductions:
            self.session.other_stepped()
            return
        found = getattr(optimizer, "found_inf", None)  # fused optimizers skip the step themselves, for GradScaler
        self.session.end_step(skipped=found is not None and bool(found), optimizer=optimizer)
        self._reductions = 0

    def _holds(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(id(p) in self._names for group in optimizer.param_groups for p in group["params"])

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory, as of the last step that is done; {} before the first."""
        if not self.session.started:
            return dict(self._loaded.state)
        if self._shadow and self._reductions:  # the others have stepped, or join() would not be over
            self.session.end_step()
            self._reductions = 0
        return self.session.state_dict()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write this rank's file."""
        Folder(folder).write(on_cpu(self.state_dict()), self.rank, self._size, sweep=self.rank == 0)

    def load(self, read: Callable[[], Any]) -> None:
        """Continue from the state that `read` returns, this rank's or a list of all ranks' of a world of any size;
        every rank calls this. Before the first step it is then that ranks compare what they have found.

        Raises:
            CompressionError: some rank cannot continue, or from another step; on every rank.
        """
        judged = self.session.judge(read, self.rank, self._size)
        if not self.session.started:
            self._loaded = judged
            self.session.load_hooks(judged.state)
            return
        self._loads += 1
        facts = {"compression state": judged.standing}
        self._agree(f"{self.session.name}/load/{self._loads}", facts, "it did not call load_state_dict")
        if judged.bad:
            raise CompressionError(f"DDP compression: {judged.standing}")
        if judged.state:
            self.session.load_state_dict(judged.state)
        else:
            self.session.forget(self.session.reducer.step)
        self._reductions = 0

    def load_folder(self, folder: str | os.PathLike[str]) -> None:
        """`load` from what `save` wrote."""
        self.load(reader(folder, "DDP", self.rank, self._size))

    def _agree(self, name: str, facts: dict[str, Any], absent: str) -> None:
        handshake(_get_default_store(), "DDP", name, self.rank, self._size, facts, absent, remedy=_REMEDY)


def reduce_bucket(state, bucket):  # DDP reads the signature and refuses annotations that are text
    """The communication hook; `state` is the `Compression` of the model."""
    with torch.autocast(bucket.buffer().device.type, enabled=False):  # on where backward() is called inside autocast
        return state.take(bucket)


@torch.compiler.disable
def _before_forward(module: Any, _: Any) -> None:
    compression = _compressed.get(module)
    if not torch.is_grad_enabled():
        if compression is not None and not module.training:
            compression.session.before_read()
        return
    if compression is None:
        if module.training:
            warn("DDP: this is a copy of a compressed model, whose hook is not copied: it trains dense")
        return
    if not compression.registered:
        if name := hook_of(module):
            announce(f"DDP: the script has registered a communication hook of its own, {name!r}, which stays")
            del _compressed[module]
            return
        compression.register(module)
    compression.before_forward(module.training)


def _watch_optimizers() -> None:
    """By torch's public hooks, which last for the process; once."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_before_step))
        _watching.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for compression in list(_compressed.values()):
        compression.about_to_step(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for compression in list(_compressed.values()):
        compression.stepped(optimizer)
