"""The internals of DeepSpeed that we use exist, and do what we expect.

Each entry is the path of an internal, a text that its source must contain for our use to be correct (empty: it only has
to exist), and its purpose. A failure names the entry: look there first when DeepSpeed's version changes.
"""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
from helpers.launch import run_ranks

from mythos_dist.config.schema import Config

pytestmark = pytest.mark.launch  # imports DeepSpeed
REPOSITORY = Path(__file__).parents[2]
ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
PIPE = "deepspeed.runtime.pipe.module.PipelineModule"
PIPE_ENGINE = "deepspeed.runtime.pipe.engine.PipelineEngine"
STAGE3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
STAGE12 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
INTERNALS = [
    # groups
    ("deepspeed.utils.groups.mpu", "", "the process groups of the engine"),
    ("deepspeed.utils.groups._get_expert_parallel_group", "_EXPERT_PARALLEL_GROUP[", "our expert groups"),
    ("deepspeed.utils.groups._get_expert_parallel_group_ranks", "_EXPERT_PARALLEL_GROUP_RANKS[", "our expert groups"),
    (
        "deepspeed.utils.groups._get_expert_data_parallel_group",
        "_EXPERT_DATA_PARALLEL_GROUP[",
        "our expert-data groups",
    ),
    (
        "deepspeed.utils.groups._get_expert_data_parallel_group_ranks",
        "_EXPERT_DATA_PARALLEL_GROUP_RANKS[",
        "their ranks",
    ),
    (
        "deepspeed.utils.groups._get_expert_model_parallel_world_size",
        "expert_tensor_parallel_world_size",
        "bf16's norm",
    ),
    ("deepspeed.runtime.pipe.topology.PipelineParallelGrid.get_slice_parallel_group", "", "tensor groups by mpu"),
    ("deepspeed.ops.__compatible_ops__", "", "no compilation at the start on CPUs"),
    # batch size
    (f"{ENGINE}.set_train_batch_size", "self._config.gradient_accumulation_steps = new_gas", "micro-batches of a step"),
    (f"{PIPE_ENGINE}.set_train_batch_size", "self.micro_batches = self.gradient_accumulation_steps()", "the same"),
    (
        f"{ENGINE}.is_gradient_accumulation_boundary",
        "(self.micro_steps + 1) % self.gradient_accumulation_steps() == 0",
        "the count that starts over in each step",
    ),
    # dry runs
    (
        f"{PIPE_ENGINE}._recv_tensor_meta",
        "return self._allocate_or_extend_buffers(0, recv_shape, recv_dtype)",
        "shapes",
    ),
    ("deepspeed.runtime.zero.partition_parameters.assert_ints_same_as_other_ranks", "", "a message left out"),
    ("deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks", "", "the same"),
    (f"{STAGE12}.setup_buckets", "torch.empty(int(self.reduce_bucket_size)", "the bucket, in a backward pass"),
    (f"{STAGE12}.copy_grads_in_partition", "self.params_in_partition", "ZeRO-2: the gradients that a rank keeps"),
    (
        f"{STAGE3}._setup_for_real_optimizer",
        "bucket.buffer = torch.empty(self.reduce_bucket_size",
        "the bucket, always",
    ),
    # experts
    (f"{ENGINE}._configure_distributed_model", "isinstance(module, _AutoEPMoELayer)", "experts are recognized"),
    (f"{ENGINE}._validate_zero3_moe_compatibility", "_AutoEPMoELayer", "ZeRO-3 accepts our experts"),
    (f"{ENGINE}._resolve_zero3_param_placement", "ds_zero_placement_family", "ZeRO-3 shards experts over expert-data"),
    (f"{ENGINE}._resolve_zero3_param_placement", "ds_zero_partition_group_name", "and by this name"),
    ("deepspeed.moe.utils.is_moe_param", "allreduce", "the mark of an expert's parameter"),
    ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._configure_moe_settings", "group['name']", "groups"),
    # gradient norms
    ("deepspeed.runtime.utils.is_model_parallel_parameter", "tensor_model_parallel", "the mark of a sharded parameter"),
    ("deepspeed.runtime.utils.get_norm_with_moe_layers", "expert_tensors.items()", "a norm that skips empty lists"),
    (
        "deepspeed.runtime.bf16_optimizer.BF16_Optimizer.get_grads_for_norm",
        "for_clipping=False",
        "the lists we fix",
    ),
    ("deepspeed.runtime.bf16_optimizer.BF16_Optimizer.step", "self.get_grads_for_norm()", "the lists we fix"),
    (
        f"{STAGE3}._grad_norm_counts_every_rank",
        "if self._autoep_expert_parallel_group(params) is not None:",
        "the norm that we fix",
    ),
    # partitions
    ("deepspeed.utils.tensor_fragment.tensor_fragment", "lp_fragment_address: fragment_address", "ZeRO-1, 2: which"),
    ("deepspeed.utils.tensor_fragment.tensor_fragment", "hp_fragment_address: fragment_address", "and where it is"),
    (f"{STAGE12}._link_all_hp_params", "flat_hp_partition = self.single_partition_of_fp32_groups[i]", "masters"),
    (f"{STAGE12}.__init__", "param_group['params'] = [self.single_partition_of_fp32_groups[i]]", "masters"),
    (f"{STAGE12}.update_lp_params", "bit16_partitions[partition_id].data.copy_(fp32_partition.data)", "after loading"),
    (f"{BF16}._setup_for_real_optimizer", "param_group['params'] = [self.fp32_groups_flat_partition[i]]", "masters"),
    (f"{BF16}.update_lp_params", "bf16_partitions[partition_id].data.copy_(fp32_partition.data)", "after loading"),
    (
        f"{STAGE3}._get_fp32_opt_state_partition",
        "group_idx, dest_offset, num_elements = self.grad_position",
        "ZeRO-3: which part",
    ),
    (STAGE3, "        self._partition_all_parameters()", "after loading"),  # of `step`, which a decorator hides
    (f"{STAGE3}._reassign_or_swap_out_partitioned_parameters", "", "after loading"),
    (f"{STAGE3}.checkpoint_event_epilogue", "self.persistent_parameters[0].all_gather(", "after loading"),
    (f"{ENGINE}.__init__", "self.skipped_steps = 0", "counts that are set when loading"),
    ("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler.__init__", "self.cur_hysteresis", "fp16's loss scale"),
    # memory of an engine that is closed
    (f"{ENGINE}.destroy", "optimizer.destroy()", "its hooks are removed"),
    (f"{STAGE12}.destroy", "hook.remove()", "its hooks are removed"),
    (f"{STAGE3}.destroy", "hook.remove()", "its hooks are removed"),
    ("deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK", "", "ZeRO-3: the model is in this list"),
    # Muon
    (
        f"{BF16}._setup_for_real_optimizer",
        "self.nccl_start_alignment_factor * real_dp_world_size",
        "ranges of replicas",
    ),
    (f"{STAGE12}.__init__", "self.nccl_start_alignment_factor * dist.get_world_size(", "ranges of replicas"),
    (f"{STAGE12}._optimizer_step", "self.optimizer.param_groups = [original_param_groups[group_no]]", "a group a step"),
    # stages
    (f"{PIPE}.__init__", "self._partition_layers(", "our bounds"),
    (f"{PIPE}._build", "specs[self._local_start:self._local_stop]", "our bounds"),
    (f"{PIPE}._build", "isinstance(layer, nn.Module)", "a stage as one layer"),
    (f"{PIPE_ENGINE}._exec_schedule", "self._INSTRUCTION_MAP[type(cmd)]", "our tied weights"),
    (f"{PIPE_ENGINE}._exec_reduce_tied_grads", "weight._hp_grad if self.using_bf16_optimizer else", "our tied weights"),
    (f"{PIPE_ENGINE}._exec_forward_pass", "self.loss = outputs", "a last stage that computes the loss itself"),
    (f"{PIPE_ENGINE}.eval_batch", "num_micro_batches", "evaluation under pipe"),
    ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.get_grad_norm_direct", "ds_pipe_replicated", "norm"),
    ("deepspeed.runtime.compiler.dummy_decorator", "", "start: Muon without a compiler"),
    ("deepspeed.runtime.zero.utils.is_zero_supported_optimizer", "muon_optimizer import", "start: who imports Muon"),
    ("deepspeed.runtime.zero.muon.original_muon.muon_update", "", "start: Muon"),
    (f"{STAGE12}.step", "self._global_grad_norm =", "limit on norms: known before the optimizer's step"),
    (f"{BF16}.step", "self._global_grad_norm =", "limit on norms"),
    # universal checkpoints
    (f"{ENGINE}.load_checkpoint", '"latest_universal" if', "the name of the folder"),
    (f"{ENGINE}._get_ckpt_name", '"zero_pp_rank_{}".format(pp_rank)', "ZeRO-3: the file with counts"),
    (
        f"{STAGE12}.load_hp_checkpoint_state_from_checkpoint_dir",
        "optim_sd['param_groups'])",
        "as many groups as listed",
    ),
    (
        f"{STAGE3}.load_hp_checkpoint_state_from_checkpoint_dir_stage3",
        """optim_sd[OPTIMIZER_STATE_DICT]["param_groups"][0].items()""",
        "ZeRO-3: the first group's settings for all",
    ),
    (
        f"{STAGE3}.load_hp_checkpoint_state_from_checkpoint_dir_stage3",
        "self.optimizer.state[fp32_param]['step'] = state_step",
        "ZeRO-3: one count of steps for all groups, as docs/checkpoints.md says",
    ),
]


@pytest.mark.parametrize(
    ("path", "text", "purpose"), INTERNALS, ids=[f"{e[0].rsplit('.', 1)[1]}-{e[2]}" for e in INTERNALS]
)
def test_a_deepspeed_internal_has_not_changed(path, text, purpose):
    parts = path.split(".")
    for module_parts in range(len(parts) - 1, 0, -1):
        try:
            internal = importlib.import_module(".".join(parts[:module_parts]))
        except ModuleNotFoundError:
            continue
        break
    else:
        pytest.fail(f"{path} does not exist; needed for: {purpose}")
    for part in parts[module_parts:]:
        assert hasattr(internal, part), f"{path} has moved: no {part}; needed for: {purpose}"
        internal = getattr(internal, part)
    if text:
        assert text in inspect.getsource(internal), f"{path} no longer contains {text!r}; needed for: {purpose}"


@pytest.mark.launch
def test_an_engine_is_built_without_loading_a_compiler(config):
    """DeepSpeed's Muon would import torch.compile, which takes seconds on every rank."""
    assert run_ranks(1, modules_of_a_compiler, config) == [[]]


def modules_of_a_compiler(config: Config) -> list[str]:
    from mythos_dist.parallel.mesh import build_mesh
    from mythos_dist.train.engine import Engine

    Engine(config, build_mesh(config.parallel))
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules, "the engine checks for it"
    return [name for name in sys.modules if name.startswith("torch._inductor.compile_fx")]


def test_the_installed_version_is_the_pinned_one():
    import deepspeed

    pinned = re.search(r'"deepspeed==([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert pinned and deepspeed.__version__.split("+")[0] == pinned[1]


def test_deepspeeds_internals_are_used_in_few_files():
    """In three files of train/, in the switch that prevents compilation at the start, and in the dry run."""
    private = re.compile(r"deepspeed[\w.]*\._|groups\._|from deepspeed\.(checkpoint|module_inject|runtime)")
    users = [
        path.name
        for path in (REPOSITORY / "mythos_dist").rglob("*.py")
        if private.search(path.read_text(encoding="utf-8"))
    ]
    assert sorted(users) == [
        "deepspeed_patches.py",
        "fake_world.py",
        "pipeline_stage.py",
        "process.py",
        "zero_state.py",
    ]


def test_the_version_of_universal_checkpoints_is_deepspeeds():
    from deepspeed.checkpoint import constants

    from mythos_dist.checkpoint.universal import UNIVERSAL_VERSION

    assert constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE == UNIVERSAL_VERSION
