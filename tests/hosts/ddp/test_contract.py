"""What the adapter uses of torch, and what it relies on there."""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer

from compression_plugins.adapters.ddp.hook import reduce_bucket


def test_the_public_seams_are_there():
    assert list(inspect.signature(DistributedDataParallel.register_comm_hook).parameters) == ["self", "state", "hook"]
    for name in ("buffer", "gradients", "parameters", "is_last", "index"):
        assert hasattr(dist.GradBucket, name)
    assert callable(optimizer.register_optimizer_step_post_hook)
    assert callable(optimizer.register_optimizer_step_pre_hook)
    assert callable(torch.nn.Module.register_state_dict_pre_hook)
    assert "mode" in inspect.signature(torch.autograd.graph.register_multi_grad_hook).parameters
    from torch.distributed.run import get_args_parser, run

    assert callable(run) and "--nproc-per-node" in get_args_parser().format_help()


def test_the_private_ones_too():
    from torch.distributed.distributed_c10d import _get_default_store

    assert callable(_get_default_store)
    assert torch._C._current_graph_task_id() == -1  # outside of backward, where ranks under join() call hooks
    assert callable(torch.autograd.Variable._execution_engine.queue_callback)


def test_ddp_accepts_the_signature_of_the_hook():
    assert list(inspect.signature(reduce_bucket).parameters) == ["state", "bucket"]
    assert not inspect.get_annotations(reduce_bucket)  # as text they would be refused


def test_a_model_that_is_built_says_what_is_asked_of_it(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(torch.nn.Linear(2, 2))
        assert not ddp._get_ddp_logging_data().get("comm_hook")
        ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
        assert ddp._get_ddp_logging_data()["comm_hook"]
        for name in ("process_group", "device", "module", "mixed_precision", "parameters_to_ignore", "reducer"):
            assert hasattr(ddp, name), name
        assert ddp._join_config.enable is False
        assert ddp._use_python_reducer is False and ddp.skip_all_reduce_unused_params is False
        ddp.join(divide_by_initial_world_size=False)
        assert ddp._divide_by_initial_world_size is False
    finally:
        dist.destroy_process_group()
