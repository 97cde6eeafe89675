"""Every seam of DeepSpeed that the adapter relies on. A failure names the version and what has changed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

deepspeed = pytest.importorskip("deepspeed")

from deepspeed.comm import comm  # noqa: E402
from deepspeed.comm.torch import Noop, TorchBackend  # noqa: E402
from deepspeed.runtime import config as runtime_config  # noqa: E402
from deepspeed.runtime import constants, utils  # noqa: E402
from deepspeed.runtime.base_optimizer import ZeROOptimizer  # noqa: E402
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # noqa: E402
from deepspeed.runtime.comm import coalesced_collectives  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: E402
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # noqa: E402
from deepspeed.runtime.tensor_parallel import init_utils  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import Init  # noqa: E402
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator  # noqa: E402
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, IPGBucket  # noqa: E402

from compression_plugins.adapters.deepspeed import reading  # noqa: E402

WHO = f"DeepSpeed {deepspeed.__version__} has changed a seam of compression_plugins.adapters.deepspeed: "


def private(cls: type, name: str):
    """A method whose name the class mangles."""
    return getattr(cls, f"_{cls.__name__}__{name}")


#: Function -> its leading parameters, as the adapter passes or reads them.
SIGNATURES = {
    TorchBackend.all_reduce: "self tensor op group async_op",
    TorchBackend.reduce: "self tensor dst op group async_op",
    TorchBackend.all_gather_into_tensor: "self output_tensor input_tensor group async_op",
    DeepSpeedEngine._is_supported_optimizer: "self optimizer_name",
    DeepSpeedEngine._configure_basic_optimizer: "self model_parameters",
    DeepSpeedEngine.buffered_allreduce_fallback: "self grads elements_per_buffer",
    DeepSpeedEngine._get_gradients_for_reduction: "self",
    DeepSpeedEngine._backward_prologue: "self",
    DeepSpeedEngine._backward_epilogue: "self",
    DeepSpeedEngine.zero_grad: "self",
    DeepSpeedZeroOptimizer.reduce_ipg_grads: "self comm_dtype",
    DeepSpeedZeroOptimizer.get_gradient_for_reduction: "self param",
    DeepSpeedEngine._take_model_step: "self lr_kwargs",
    DeepSpeedEngine._save_checkpoint: "self save_dir tag",
    DeepSpeedEngine._load_checkpoint: "self load_dir tag",
    DeepSpeedZeroOptimizer.allreduce_and_scatter: "self bucket communication_data_type",
    DeepSpeedZeroOptimizer.allreduce_bucket: "self bucket communication_data_type rank",
    DeepSpeedZeroOptimizer.gradient_reduction_w_predivide: "self tensor communication_data_type",
    private(DeepSpeedZeroOptimizer_Stage3, "avg_scatter_grads"): "self params_to_reduce communication_data_type",
    private(DeepSpeedZeroOptimizer_Stage3, "avg_scatter_contiguous_grads"): (
        "self buffer_to_reduce communication_data_type"
    ),
    private(DeepSpeedZeroOptimizer_Stage3, "reduce_and_partition_ipg_grads"): "self communication_data_type",
    DeepSpeedZeroOptimizer_Stage3.partition_grads: "self params_to_release grad_partitions",
    DeepSpeedConfig.__init__: "self config mpu mesh_device",
    init_utils.load_ds_config: "config",
}

#: Function -> patterns that its source must contain: what happens inside a scope, and in which order.
SOURCES = {
    DeepSpeedEngine.allreduce_bucket: [  # what our mean over ranks stands for
        r"mul_\(1\.0 / self\.gradient_predivide_factor\(\)\)\s+dist\.all_reduce\(tensor_to_allreduce, group=dp_group\)",
        r"mul_\(1\. / dp_world_size\)\s+dist\.all_reduce\(tensor_to_allreduce, group=dp_group\)",
    ],
    DeepSpeedEngine.allreduce_gradients: [
        r"self\.buffered_allreduce_fallback\(grads=grads, elements_per_buffer=bucket_size\)",
        r"self\.optimizer\.overlapping_partition_gradients_reduce_epilogue\(\)",
    ],
    DeepSpeedEngine._get_gradients_for_reduction: [r"param\.grad = torch\.zeros\("],
    DeepSpeedEngine._backward_post_hook: [r"self\._backward_epilogue\(\)"],
    DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue: [
        # results that are written after this call are in time
        r"(?s)self\.reduce_ipg_grads\(\).*self\.get_all_grad_tensors\(.*self\.get_flat_partition\(",
    ],
    DeepSpeedZeroOptimizer.reduce_ipg_grads: [
        r"self\.is_param_in_current_partition\[param_id\]:\s+self\.copy_grads_in_partition\(param, group_idx\)",
    ],
    DeepSpeedEngine.save_checkpoint: [r"(?s)self\._save_checkpoint\(.*'latest'"],
    DeepSpeedEngine.load_checkpoint: [
        r"(?s)self\._load_checkpoint\(.*load_optimizer_states=load_optimizer_states.*load_module_only=load_module_only",
    ],
    DeepSpeedEngine.step: [r"self\._take_model_step\("],
    DeepSpeedEngine._take_model_step: [r"self\.optimizer\.overflow"],
    DeepSpeedZeroOptimizer.average_tensor: [
        r"tensor\.div_\(dist\.get_world_size\(group=self\.dp_process_group\)",
        r"(?s)self\.allreduce_and_scatter\(buckets\[bucket_key\].*divide=False",
        r"buckets\[bucket_key\]\.append\(\(copy_ranks, grad_slice, grad_partition_output\)\)",
        r"for i, param_idx_in_group, param_id in bucket\.params",
    ],
    DeepSpeedZeroOptimizer.allreduce_and_copy_with_multiple_ranks: [
        r"self\.allreduce_bucket\(small_bucket",
        r"(?s)if copy_to_local_rank:.*buf\.copy_\(synced\)",  # other ranks' slices may hold anything
    ],
    DeepSpeedZeroOptimizer.allreduce_bucket: [
        r"self\.flatten\(bucket\)",
        r"dist\.all_reduce\(tensor_to_allreduce, group=process_group\)",
        r"dist\.reduce\(tensor_to_allreduce, global_rank, group=process_group\)",
    ],
    DeepSpeedZeroOptimizer.gradient_reduction_w_predivide: [r"dist\.all_reduce\(", r"self\.postscale_gradients"],
    DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads: [
        r"bucket\.buffer\[bucket\.index\]\.narrow\(0, bucket\.elements, param\.numel\(\)\)",
        r"bucket\.params\.append\(\(i, param\.param_idx_in_group, param_id\)\)",
        r"self\.extra_large_param_to_reduce\[comm_dtype\] = param",
    ],
    private(DeepSpeedZeroOptimizer_Stage3, "reduce_and_partition_ipg_grads"): [
        r"self\.__avg_scatter_contiguous_grads\(grad_bucket, communication_data_type\)",
        r"self\.__avg_scatter_grads\(params_in_bucket, communication_data_type\)",
        r"self\.partition_grads\(params_in_bucket, grad_partitions\)\s+params_in_bucket\.clear\(\)",
    ],
    DeepSpeedZeroOptimizer_Stage3.independent_gradient_partition_epilogue: [
        # slices that are added in this call are in time
        r"(?s)self\.__reduce_and_partition_ipg_grads\(comm_dtype\).*synchronize\(\).*self\.averaged_gradients\[i\] =",
    ],
    DeepSpeedZeroOptimizer_Stage3.partition_grads: [
        r"\.narrow\(0, 0, grad_partition\.numel\(\)\)",  # slices need not be padded
        r"if self\.micro_step_id == 0:",
    ],
    coalesced_collectives.reduce_scatter_coalesced: [r"\.div_\(world_sz\)"],  # always an average
    Init._convert_to_deepspeed_param: [r"param\.all_gather_coalesced = all_gather_coalesced"],
    private(PartitionedParameterCoordinator, "all_gather_params_"): [
        r"handle = param_group\[0\]\.all_gather_coalesced\(param_group, quantize=quantize\)",
    ],
    BF16_Optimizer._setup_for_real_optimizer: [
        r"self\.fp32_groups_gradients_flat\.append\(fp32_flat_buffer\)",
        r"self\.bf16_groups\.append\(trainable_parameters\)",
    ],
    utils.all_gather_into_tensor_dp_groups: [
        r"dist\.all_gather_into_tensor\(group_flat, partitioned_params\[partition_id\]"
    ],
    comm.all_reduce: [r"return cdb\.all_reduce\(tensor, op, group, async_op\)"],
    comm.all_gather_into_tensor: [r"return cdb\.all_gather_into_tensor\("],
}


def unwrapped(function):
    """The function as DeepSpeed wrote it, without its decorators and ours."""
    function = inspect.unwrap(function)
    inner = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)).get("func")
    return unwrapped(inner.cell_contents) if inner else function


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: unwrapped(f).__qualname__)
def test_a_seam_takes_the_parameters_that_the_adapter_reads(function):
    original = unwrapped(function)
    expected = SIGNATURES[function].split()
    found = list(inspect.signature(original).parameters)[: len(expected)]
    assert found == expected, f"{WHO}{original.__qualname__} takes {found}, expected {expected}"


@pytest.mark.parametrize("function", SOURCES, ids=lambda f: unwrapped(f).__qualname__)
def test_a_seam_does_what_the_adapter_assumes(function):
    original = unwrapped(function)
    source = inspect.getsource(original)
    for pattern in SOURCES[function]:
        assert re.search(pattern, source), f"{WHO}{original.__qualname__} no longer contains /{pattern}/"


def test_collectives_go_through_the_module_global_backend():
    assert hasattr(comm, "cdb"), f"{WHO}deepspeed.comm.comm.cdb is gone"
    assert Noop().wait() is None, f"{WHO}Noop().wait() returns a value"


def test_zero_buckets_have_the_fields_that_locate_a_slice():
    fields = set(IPGBucket.__dataclass_fields__)
    needed = {"buffer", "index", "params", "grads", "elements"}
    assert needed <= fields, f"{WHO}IPGBucket lacks {needed - fields}"


def test_four_bit_gradients_of_zero_plus_plus_still_read_bf16_as_fp16():
    """When this fails, look whether the quantizer knows bf16 now, and drop the warning (`zeropp.concern`)."""
    source = inspect.getsource(unwrapped(coalesced_collectives.all_to_all_quant_reduce))
    assert "quantizer_module.swizzle_quant(tensor, " in source, f"{WHO}gradients are cast before they are quantized"
    binding = Path(deepspeed.__file__).parent / "ops/csrc/quantization/pt_binding.cpp"
    assert "(__half*)input_vals.data_ptr()" in binding.read_text(), f"{WHO}the quantizer looks at the dtype now"


def test_no_key_that_deepspeed_knows_is_taken_for_the_block():
    source = inspect.getsource(runtime_config) + inspect.getsource(constants)
    words = set(re.findall(r"""["']([a-z][a-z0-9_]{2,40})["']""", source)) - {reading.BLOCK}
    assert {"communication_data_type", "zero_optimization", "compression_training"} <= words
    reading.refuse_near_misses(dict.fromkeys(words))


def test_the_optimizer_is_chosen_by_name_where_the_adapter_adds_three():
    assert "self.optimizer_name()" in inspect.getsource(unwrapped(DeepSpeedEngine._configure_basic_optimizer))
    source = inspect.getsource(unwrapped(DeepSpeedEngine._backward_epilogue))
    assert re.search(r"if self\.enable_backward_allreduce and .*:\s+#.*\s+self\.allreduce_gradients\(\)", source), WHO
    assert re.search(r"enable_backward_allreduce is False:\s+dist\.all_reduce\(overflow_gpu", inspect.getsource(utils))


def test_the_loss_scale_is_readable():
    assert isinstance(DeepSpeedZeroOptimizer.loss_scale, property), f"{WHO}the ZeRO optimizer has no loss_scale"
    assert isinstance(FP16_UnfusedOptimizer.loss_scale, property), f"{WHO}FP16_UnfusedOptimizer has no loss_scale"
    assert not hasattr(BF16_Optimizer, "loss_scale"), f"{WHO}BF16_Optimizer scales the loss now"


def test_fp16_at_stage_0_is_still_refused_for_a_reason():
    """When this fails, look whether the loss is scaled at stage 0 now, and drop the refusal."""
    source = inspect.getsource(unwrapped(DeepSpeedEngine.backward))
    scaled = re.search(r"isinstance\(self\.optimizer, ZeROOptimizer\):\s+loss = ", source)
    assert scaled, f"{WHO}engine.backward scales the loss in another way"
    assert not issubclass(FP16_UnfusedOptimizer, ZeROOptimizer), f"{WHO}fp16 at stage 0 has a scaled loss now"


def test_the_config_keeps_its_document_and_the_fields_that_decide_a_refusal():
    config = DeepSpeedConfig({"train_batch_size": 1})
    for field in ("_param_dict", "zero_config", "compile_config", "communication_data_type", "grad_accum_dtype"):
        assert hasattr(config, field), f"{WHO}DeepSpeedConfig.{field} is gone"
    for field in ("stage", "zenflow", "zero_quantized_gradients", "offload_optimizer"):
        assert hasattr(config.zero_config, field), f"{WHO}zero_optimization.{field} is gone"
    assert config.compile_config.deepcompile is False, f"{WHO}compile.deepcompile is gone"


def test_a_host_without_a_seam_is_refused_by_name_and_version():
    from compression_plugins.adapters.deepspeed.seams import check
    from compression_plugins.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match=r"DeepSpeed 9\.9\.9 has no object\.allreduce_bucket"):
        check(object(), ["allreduce_bucket"], "9.9.9")


def test_the_example_configs_say_the_same_and_deepspeed_accepts_them():
    from compression_plugins.adapters.deepspeed.engine import install

    install()
    folder = Path(__file__).parents[3] / "configs/deepspeed"
    documents = [init_utils.load_ds_config(str(folder / f"example.{kind}")) for kind in ("json", "yaml")]
    assert documents[0] == documents[1]
    config = DeepSpeedConfig(documents[1])
    assert config.communication_compression.scheme.name == "scalecom"
    assert DeepSpeedConfig(str(folder / "example.yaml")).optimizer_params["lr"] == 1e-3
