"""What we lean on inside DeepSpeed is still there, and still read as we read it.

Each entry is the path of something internal, what its source must say for our use of it to hold (nothing: it only has
to exist), and what we need it for. A failure names the entry: look there first when DeepSpeed's version changes.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
PIPE = "deepspeed.runtime.pipe.module.PipelineModule"
PIPE_ENGINE = "deepspeed.runtime.pipe.engine.PipelineEngine"
STAGE3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
AUTOEP = "deepspeed.checkpoint.constants"
LEANED_ON = [
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
    # experts
    (f"{ENGINE}._configure_distributed_model", "isinstance(module, _AutoEPMoELayer)", "experts are recognised"),
    (f"{ENGINE}._validate_zero3_moe_compatibility", "_AutoEPMoELayer", "ZeRO-3 lets our experts in"),
    (f"{ENGINE}._resolve_zero3_param_placement", "ds_zero_placement_family", "ZeRO-3 shards experts over expert-data"),
    (f"{ENGINE}._resolve_zero3_param_placement", "ds_zero_partition_group_name", "and by this name"),
    ("deepspeed.moe.utils.is_moe_param", "allreduce", "the mark of an expert's parameter"),
    ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._configure_moe_settings", "group['name']", "groups"),
    ("deepspeed.checkpoint.autoep_affine.legacy_uniform_autoep_placement_descriptor", "", "where experts lie"),
    ("deepspeed.checkpoint.autoep_affine.autoep_placement_to_affine_map", "", "where experts lie"),
    ("deepspeed.checkpoint.autoep_affine.autoep_experts_for_rank", "", "where experts lie"),
    *((f"{AUTOEP}.{name}", "", "what a saved expert is") for name in ("DS_AUTOEP_UC_META", "AUTOEP_EXPERT_PLACEMENT")),
    *((f"{AUTOEP}.{name}", "", "what a saved expert is") for name in ("AFFINE_MAP", "AUTOEP_PARAM_LOGICAL_SHAPE")),
    *((f"{AUTOEP}.AUTOEP_PARAM_{name}", "", "what a saved expert is") for name in ("EP_RANK", "LOCAL_EXPERTS")),
    (f"{ENGINE}._save_moe_checkpoint", "('w1', 'w2', 'w3')", "the names of experts' weights"),
    (f"{ENGINE}.load_moe_state_dict", "('w1', 'w2', 'w3')", "the names of experts' weights"),
    # gradient norms
    ("deepspeed.runtime.utils.is_model_parallel_parameter", "tensor_model_parallel", "the mark of a cut parameter"),
    ("deepspeed.runtime.utils.get_norm_with_moe_layers", "expert_tensors.items()", "a norm that skips empty lists"),
    ("deepspeed.runtime.bf16_optimizer.BF16_Optimizer.get_grads_for_norm", "for_clipping=False", "the lists we mend"),
    ("deepspeed.runtime.bf16_optimizer.BF16_Optimizer.step", "self.get_grads_for_norm()", "the lists we mend"),
    (
        f"{STAGE3}._grad_norm_counts_every_rank",
        "if self._autoep_expert_parallel_group(params) is not None:",
        "the norm we mend",
    ),
    # stages
    (f"{PIPE}.__init__", "self._partition_layers(", "our bounds"),
    (f"{PIPE}._build", "specs[self._local_start:self._local_stop]", "our bounds"),
    (f"{PIPE}._build", "isinstance(layer, nn.Module)", "a stage as one layer"),
    (f"{PIPE}.ckpt_layer_path", "self._local_start", "a file of its own for each stage"),
    (f"{PIPE_ENGINE}._exec_reduce_tied_grads", "self.module.get_tied_weights_and_groups()", "our tied weights"),
    (f"{PIPE_ENGINE}._exec_forward_pass", "self.loss = outputs", "a last stage that computes the loss itself"),
    (f"{PIPE_ENGINE}.eval_batch", "num_micro_batches", "evaluation under pipe"),
    ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.get_grad_norm_direct", "ds_pipe_replicated", "norm"),
]


@pytest.mark.parametrize(
    ("path", "says", "purpose"), LEANED_ON, ids=[f"{e[0].rsplit('.', 1)[1]}-{e[2]}" for e in LEANED_ON]
)
def test_deepspeed_has_not_moved(path, says, purpose):
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        break
    else:
        pytest.fail(f"{path} is gone; needed for: {purpose}")
    for part in parts[cut:]:
        assert hasattr(found, part), f"{path} has moved: no {part}; needed for: {purpose}"
        found = getattr(found, part)
    if says:
        assert says in inspect.getsource(found), f"{path} no longer says {says!r}; needed for: {purpose}"


def test_the_version_is_the_one_that_is_pinned():
    import deepspeed

    pinned = re.search(r'"deepspeed==([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert pinned and deepspeed.__version__.split("+")[0] == pinned[1]


def test_the_seam_is_where_deepspeeds_internals_are_used():
    """Private names of DeepSpeed appear in one file, but for the switch that keeps it from compiling when it starts."""
    private = re.compile(r"deepspeed[\w.]*\._|groups\._|from deepspeed\.(checkpoint|module_inject|runtime)")
    users = [
        path.name
        for path in (REPOSITORY / "mythos_dist").rglob("*.py")
        if private.search(path.read_text(encoding="utf-8"))
    ]
    assert sorted(users) == ["deepspeed_seam.py", "process.py"]
