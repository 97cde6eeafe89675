"""What the adapter relies on, asked of Horovod alone, in one process: nothing here is compressed."""

from __future__ import annotations

import inspect
import os

import horovod.torch as hvd
import torch
from checks import check, report
from horovod.runner import launch
from horovod.runner.common.util import env as env_util
from horovod.torch import mpi_ops
from horovod.torch import optimizer as host
from horovod.torch.elastic import state as elastic
from torch import nn

before = mpi_ops._handle_map
hvd.init()
os.environ["HOROVOD_ELASTIC"] = "1"  # hooks with one rank, too
HOOK = host._DistributedOptimizer._allreduce_grad_async


def names(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


class Recorder:
    """A compressor, and a replacement of `_allreduce_grad_async` that returns callable handles."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def compress(self, tensor: torch.Tensor) -> tuple:
        self.events.append("compress")
        return tensor, None

    def decompress(self, tensor: torch.Tensor, ctx: object) -> torch.Tensor:
        self.events.append(f"decompress {ctx}")
        return tensor

    def submit(self, optimizer: object, p: torch.Tensor) -> tuple:
        name = optimizer._parameter_names[p]
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        self.events.append(f"submit {name}")

        def handle() -> torch.Tensor:
            self.events.append(f"take {name}")
            return torch.full_like(p, 7.0)

        return handle, name


def step(**options: object) -> tuple[Recorder, nn.Module, object]:
    recorder = Recorder()
    host._DistributedOptimizer._allreduce_grad_async = lambda self, p: recorder.submit(self, p)
    try:
        model = nn.ModuleDict({"used": nn.Linear(2, 2, bias=False), "unused": nn.Linear(2, 2, bias=False)})
        base = torch.optim.SGD(model.parameters(), 0.0)
        opt = hvd.DistributedOptimizer(base, model.named_parameters(), compression=recorder, **options)
        model["used"](torch.ones(1, 2)).sum().backward()
        opt.step()
    finally:
        host._DistributedOptimizer._allreduce_grad_async = HOOK
    return recorder, model, opt


@check
def constructor() -> list[str]:
    return names(host._DistributedOptimizer.__init__)


@check
def adasum_constructor() -> list[str]:
    return names(host._DistributedAdasumOptimizer.__init__)


@check
def hooks_call_the_class_attribute_and_synchronize_calls_callable_handles() -> list[str]:
    return step()[0].events


@check
def the_result_becomes_the_gradient() -> list[float]:
    _, model, _ = step()
    return [float(model["used"].weight.grad.mean()), float(model["unused"].weight.grad.mean())]


@check
def accumulation_submits_in_the_last_pass_only() -> list[str]:
    return step(backward_passes_per_step=2)[0].events


@check
def attributes() -> list[str]:
    wanted = (
        "_compression _parameter_names _requires_update _handles _allreduce_delay _should_synchronize _synchronized op "
        "sparse_as_dense process_set gradient_predivide_factor backward_passes_per_step skip_synchronize synchronize "
        "_sparse_allreduce_grad_async"
    )
    opt = step()[2]
    return [name for name in wanted.split() if not hasattr(opt, name)]


@check
def step_synchronizes_unless_told_not_to() -> list[bool]:
    _, _, opt = step()
    seen = [opt._should_synchronize]
    with opt.skip_synchronize():
        seen.append(opt._should_synchronize)
    return seen


@check
def operations() -> dict[str, list[str]]:
    functions = (mpi_ops.allreduce_async, mpi_ops.allgather_async, mpi_ops.alltoall_async, mpi_ops.broadcast_async)
    return {function.__name__: names(function) for function in functions}


@check
def alltoall_returns_the_splits_that_came() -> list:
    handle = hvd.alltoall_async(torch.arange(3), splits=torch.tensor([3], dtype=torch.int32), name="x")
    while not hvd.poll(handle):
        pass
    output, splits = hvd.synchronize(handle)
    return [output.tolist(), splits.tolist()]


@check
def init_makes_a_new_handle_map() -> list[bool]:
    return [mpi_ops._handle_map is not before, isinstance(mpi_ops._handle_map, dict)]


@check
def process_sets_count_their_own_ranks() -> list:
    everyone = mpi_ops.global_process_set
    return [everyone.process_set_id, everyone.ranks, everyone.rank(), everyone.size(), everyone.included()]


@check
def groups_of_ranks_need_dynamic_process_sets() -> list[bool]:
    from compression_plugins.errors import UnsupportedError
    from compression_plugins.transports import horovod

    basics = horovod.hvd_process_sets._basics
    known, basics._get_process_set_ids_and_ranks = basics._get_process_set_ids_and_ranks, dict  # that of all ranks is
    try:
        horovod.HorovodTransport("groups").subgroup([0])
    except UnsupportedError as error:
        return ["HOROVOD_DYNAMIC_PROCESS_SETS=1" in str(error)]
    finally:
        basics._get_process_set_ids_and_ranks = known
    return []


@check
def join_is_looked_up_in_the_package() -> list[bool]:
    return [hvd.join is mpi_ops.join, names(mpi_ops.join) == ["device"]]


@check
def elastic_registry() -> list[bool]:
    registry = elastic.get_handler_registry()
    methods = [callable(getattr(elastic.OptimizerStateHandler, name)) for name in ("save", "restore", "sync")]
    return [isinstance(registry, list), (torch.optim.Optimizer, elastic.OptimizerStateHandler) in registry, *methods]


@check
def launcher_builds_its_parser_from_the_modules_argparse() -> list:
    import argparse

    seen = []

    class Parser(argparse.ArgumentParser):
        def parse_args(self, args: object = None, namespace: object = None) -> object:
            seen.append(args)
            return super().parse_args(["-np", "2", "--config-file", os.devnull, "true"], namespace)

    class Stand:
        ArgumentParser = Parser

        def __getattr__(self, name: str) -> object:
            return getattr(argparse, name)

    original, launch.argparse = launch.argparse, Stand()
    load, launch.yaml.load = launch.yaml.load, lambda file, Loader: {"compression": {"scheme": "anything"}}
    try:
        parsed = launch.parse_args()
    finally:
        launch.argparse, launch.yaml.load = original, load
    return [seen, parsed.config_file == os.devnull, parsed.command]


@check
def the_environment_reaches_the_workers() -> bool:
    return bool(env_util.is_exportable("COMPRESSION_PLUGINS_CONFIG"))


report()
