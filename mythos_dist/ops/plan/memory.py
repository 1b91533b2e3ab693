"""A rank's memory between steps, by formula and by part: weights, gradient accumulators and the optimizer.

`peak_memory.py` adds what a step needs; `plan.meter` measures the same parts.

Decisions: PLAN-3.
"""

from collections.abc import Sequence

from mythos_dist.config.deepspeed import reduce_bucket_size
from mythos_dist.config.schema import Config
from mythos_dist.model.parameter_groups import kept_gradients, plan_groups
from mythos_dist.model.parameter_table import LocalParameter, state_bytes
from mythos_dist.ops.plan.activations import ITEM_BYTES
from mythos_dist.parallel.mesh import Mesh

Memory = dict[str, float]  # bytes by part

# parameters: weights as they compute. gradients: accumulators, and tensors shaped as weights in a backward pass.
# optimizer: master weights, moments, average of the weights. activations: what a forward pass saves, and its temporary
# tensors.
# communication: outputs of collectives in a backward pass or in the optimizer. workspace: everything else.
PARTS = ("parameters", "gradients", "optimizer", "activations", "workspace", "communication")

MAX_REUSE_DISTANCE = 1_000_000_000  # elements: ZeRO-3 releases a weight whose next use is further away


def uses_bf16_optimizer(config: Config) -> bool:
    """DeepSpeed's BF16_Optimizer (config/deepspeed.py): it adds gradients to fp32 accumulators and frees them."""
    return config.train.dtype == "bf16" and config.parallel.zero == 1


def micro_batches_at_peak(config: Config) -> int:
    """The fewest micro-batches of a step that show all memory that it needs: further ones only take longer.

    One per stage fills a pipeline. If gradients are not added to accumulators at once, one more micro-batch meets those
    of an earlier one.
    """
    return config.parallel.pipe if uses_bf16_optimizer(config) else config.parallel.pipe + 1


def static_memory(config: Config, mesh: Mesh, parameters: Sequence[LocalParameter]) -> Memory:
    """Between steps: DeepSpeed's optimizers (Rajbhandari et al. 2020), runtime/bf16_optimizer.py, zero/stage*.py.

    bf16 with ZeRO-1 accumulates gradients in fp32 on every rank. Otherwise they have the weights' dtype: unsharded with
    ZeRO-1, sharded over replicas with 3, and with 2 those of each parameter that the rank has a part of. ZeRO-3 gathers
    weights for a pass and keeps them (if a loop has fewer than `MAX_REUSE_DISTANCE` elements).
    """
    b, zero = ITEM_BYTES[config.train.dtype], config.parallel.zero
    memory = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for expert_sharded in (False, True):
        held = [p for p in parameters if p.expert_sharded == expert_sharded]
        elements = sum(p.numel for p in held)
        replicas = (mesh.expert_data if expert_sharded else mesh.data_context).size
        memory["parameters"] += elements * b * (1 + 1 / replicas if zero == 3 else 1)
        memory["optimizer"] += sum(p.numel * state_bytes(config, p.name) for p in held) / replicas
        if zero == 3:
            memory["gradients"] += elements * b / replicas
        elif zero == 1:
            memory["gradients"] += elements * (4 if config.train.dtype == "bf16" else b)
    # In the first micro-batch they are copied after its backward pass.
    if zero == 2 and config.train.global_batch > config.train.micro_batch * mesh.data.size:
        memory["gradients"] += kept_gradients(plan_groups(parameters, mesh), mesh).elements * b
    if zero == 3:
        memory["communication"] = bucket_bytes(config, mesh, parameters)
    return memory


def bucket_bytes(config: Config, mesh: Mesh, parameters: Sequence[LocalParameter]) -> float:
    """Bytes of the bucket in which DeepSpeed reduces gradients: ZeRO-3 always has it, the others in backward passes,
    and BF16_Optimizer never."""
    if uses_bf16_optimizer(config):
        return 0.0
    elements = sum(group.numel for group in plan_groups(parameters, mesh))
    return float(reduce_bucket_size(elements) * ITEM_BYTES[config.train.dtype])
