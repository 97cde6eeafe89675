"""An ordinary torch DDP script; `--peer` registers one of PyTorch's own communication hooks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .settings import LOCAL_PEERS
from .worker import OrdinaryStep, parser, train

_POWERSGD_RANKS = {"powersgd": 1, "powersgd2": 2}


#: Steps between averages of PyTorch's local SGD, as of our preset `transformer/small`.
_PERIOD = LOCAL_PEERS["ddp/post_local_sgd"]


class DDP(OrdinaryStep):
    _net: DistributedDataParallel

    def __init__(self, peer: str) -> None:
        dist.init_process_group("gloo")
        self.rank, self.ranks, self._peer = dist.get_rank(), dist.get_world_size(), peer
        self._power: powerSGD_hook.PowerSGDState | None = None

    def prepare(self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None, batch: int) -> None:
        self._net, self._optimizer, self._schedule = DistributedDataParallel(model), optimizer, schedule
        if self._peer == "fp16":
            self._net.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self._peer == "bf16":
            # PyTorch's hook under another name: DDP refuses that name on CPU, for want of a version of NCCL.
            self._net.register_comm_hook(None, lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket))
        elif self._peer in _POWERSGD_RANKS:
            # Two dense steps, the fewest that it allows; the default of 1000 would outlast the run.
            rank = _POWERSGD_RANKS[self._peer]
            self._power = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
            self._net.register_comm_hook(self._power, _one_after_the_other(powerSGD_hook.powerSGD_hook))
        elif self._peer == "post_local_sgd":
            self._optimizer = self._local(optimizer)
        elif self._peer != "none":
            raise ValueError(f"DDP has no hook {self._peer!r}")

    def _local(self, optimizer: Optimizer) -> Optimizer:
        """PyTorch's local SGD: every rank by itself, weights averaged every so many steps."""
        alone = [dist.new_group([rank]) for rank in range(self.ranks)][self.rank]
        state = post_localSGD_hook.PostLocalSGDState(None, alone, _PERIOD)
        self._net.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
        averager = PeriodicModelAverager(period=_PERIOD, warmup_steps=_PERIOD)
        return PostLocalSGDOptimizer(optimizer, averager)

    def model(self) -> nn.Module:
        return self._net.module

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        dist.destroy_process_group()

    def about(self) -> dict[str, object]:
        if self._power is None:
            return {"state_bytes": 0}
        held = [self._power.error_dict, self._power.p_memory_dict, self._power.q_memory_dict]
        return {"state_bytes": sum(tensor.nbytes for each in held for tensor in each.values())}


def _one_after_the_other(hook: Callable[..., Future[Tensor]]) -> Callable[..., Future[Tensor]]:
    """`hook` in a thread of its own, a bucket at a time.

    PowerSGD starts its second all-reduce when the first is done. On Gloo that order differs between ranks: all-reduces
    of different buckets meet, and the job dies.
    """
    thread = ThreadPoolExecutor(1)

    def ordered(state, bucket):  # DDP compares annotations, as text, with what it expects
        done: Future[Tensor] = Future()

        def run() -> None:
            try:
                done.set_result(hook(state, bucket).wait())
            except BaseException as error:
                done.set_exception(error)  # type: ignore[arg-type]

        thread.submit(run)
        return done

    return ordered


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    train(options, DDP(options.peer))
