"""Parameters and optimizer groups of a rank by arithmetic, against the real model on the meta device."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.selection import first_is_quick

from mythos_dist.config.schema import Config, OptimConfig, ParallelConfig
from mythos_dist.config.variants import VARIANTS
from mythos_dist.model import Mythos, MythosConfig
from mythos_dist.model.flops import stage_costs
from mythos_dist.model.parameter_groups import kept_gradients, parameter_groups, plan_groups
from mythos_dist.model.parameter_table import LocalParameter, count_parameters, local_parameters
from mythos_dist.parallel.mesh import Mesh, mesh_coordinates
from mythos_dist.parallel.pipeline import StageSpec, plan_stages
from mythos_dist.parallel.tensor import shard_of

# Hardly any size divides by three or five: key-value heads, widths, the vocabulary, the rank of the depth LoRA.
ODD: dict[str, Any] = {
    "vocab_size": 515,
    "dim": 48,
    "n_heads": 12,
    "n_kv_heads": 4,
    "max_loop_iters": 5,
    "kv_lora_rank": 16,
    "q_lora_rank": 19,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 7,
    "v_head_dim": 9,
    "n_experts": 8,
    "n_experts_per_tok": 3,
    "expert_dim": 31,
    "lora_rank": 7,
}
ODD_CONFIGS = [
    MythosConfig(**ODD),
    MythosConfig(**ODD, mode="reference"),
    MythosConfig(**ODD, attn_type="gqa"),
    MythosConfig(
        **ODD, attn_type="gqa", gqa_head_dim=6, qkv_bias=True, key_norm_weight=True, dense_dim=47, tie_embeddings=False
    ),
    MythosConfig(**ODD, prelude_layers=1),
    MythosConfig(**ODD, lora="per_loop", injection="parcae", qk_norm=True, loop_layers=3),
    MythosConfig(**ODD, lora="none", attn_type="gqa", qk_norm=True),
    MythosConfig(**ODD, n_shared_experts=0, coda_layers=3),
    MythosConfig(**ODD, attn_type="gqa", prelude_layers=0, coda_layers=0),
    MythosConfig(**ODD, n_shared_experts=0, prelude_layers=0),
]
ODD_LAYOUTS = [
    ParallelConfig(tensor=3, pipe=3),
    ParallelConfig(tensor=5, expert=2),
    ParallelConfig(tensor=2, pipe=3, expert=4),
    ParallelConfig(pipe=7),
    ParallelConfig(expert=4),
]
LARGE_LAYOUTS = [
    ParallelConfig(tensor=tensor, pipe=pipe, expert=expert)
    for tensor, expert in [(1, 1), (2, 1), (3, 4), (4, 64), (16, 1), (16, 64)]
    for pipe in (1, 3)
]


def stages_of(config: MythosConfig, stages: int) -> list[StageSpec]:
    return plan_stages(config, config.max_loop_iters, stages, stage_costs(Config(model=config)))


def build(config: MythosConfig, mesh: Mesh, stage: StageSpec) -> Mythos:
    with torch.device("meta"):
        return Mythos(config, mesh=mesh, stage=stage)


def parameters_of(model: Mythos) -> list[LocalParameter]:
    return [
        LocalParameter(
            name=name,
            shape=tuple(p.shape),
            numel=p.numel(),
            full_shape=shard_of(p).full_shape,
            shard_axes=getattr(p, "shard_axes", {}),
            expert_sharded=not getattr(p, "allreduce", True),
            gradient_sum=getattr(p, "gradient_sum", None),
        )
        for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize("name", first_is_quick(VARIANTS))
def test_local_parameters_of_each_variant_and_stage_equal_the_model(name):
    """Names, order, shapes and shard axes of all parameters, for the first rank of every stage."""
    settings: dict[str, Any] = VARIANTS[name]
    config = MythosConfig(**settings)
    for parallel in LARGE_LAYOUTS:
        world = parallel.tensor * parallel.pipe * parallel.expert
        for i, stage in enumerate(stages_of(config, parallel.pipe)):
            mesh = mesh_coordinates(parallel, world, i * parallel.tensor)
            assert list(local_parameters(config, parallel.tensor, parallel.expert, stage)) == parameters_of(
                build(config, mesh, stage)
            )


@pytest.mark.parametrize("parallel", ODD_LAYOUTS)
@pytest.mark.parametrize("config", first_is_quick(ODD_CONFIGS))
def test_local_parameters_of_every_rank_equal_the_model_when_sizes_do_not_divide(config, parallel):
    """All ranks of a replica and its experts, also those whose shard is padding only."""
    world = parallel.tensor * parallel.pipe * parallel.expert
    stages = stages_of(config, parallel.pipe)
    for rank in range(world):
        mesh = mesh_coordinates(parallel, world, rank)
        stage = stages[mesh.pipe.rank]
        assert list(local_parameters(config, parallel.tensor, parallel.expert, stage)) == parameters_of(
            build(config, mesh, stage)
        )


@pytest.mark.parametrize("parallel", ODD_LAYOUTS)
@pytest.mark.parametrize("config", ODD_CONFIGS)
def test_group_sizes_equal_the_parameter_groups_of_the_optimizer(config, parallel):
    """Expert groups, the size of each parameter in order, and the padding of pipelines; every stage, experts on two
    replicas."""
    world = 2 * parallel.tensor * parallel.pipe * parallel.expert
    for i, stage in enumerate(stages_of(config, parallel.pipe)):
        mesh = mesh_coordinates(parallel, world, i * parallel.tensor)
        model = build(config, mesh, stage)
        own = {id(parameter) for parameter in model.parameters()}
        expected = [
            (
                "moe" in group,
                [parameter.numel() for parameter in group["params"] if id(parameter) in own],
                sum(parameter.numel() for parameter in group["params"]),
            )
            for group in parameter_groups(model, OptimConfig(), mesh)
        ]
        groups = plan_groups(local_parameters(config, parallel.tensor, parallel.expert, stage), mesh)
        planned = [(g.expert_sharded, [parameter.numel for parameter in g.parameters], g.numel) for g in groups]
        assert planned == expected
        assert sum(len(sizes) for _, sizes, _ in planned) == len(own), "each parameter is in one group"
        if parallel.pipe > 1:
            per_replica = [numel / (2 if is_expert else mesh.data.size) for is_expert, _, numel in planned]
            assert len(planned) == (3 if parallel.expert > 1 else 2)
            assert all(size > 0 and size % 16 == 0 for size in per_replica), "full registers on every rank"


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(zero=2),
        ParallelConfig(zero=2, expert=4, tensor=2),
        ParallelConfig(zero=2, expert=2, context=4),
        ParallelConfig(zero=2, expert=8, context=2),
    ],
)
def test_what_zero_2_keeps_is_that_of_the_replica_with_most(parallel):
    """Element by element: a parameter counts where any of its elements is in the partition of a rank."""
    world = 16 * parallel.tensor
    held = local_parameters(MythosConfig(**ODD), parallel.tensor, parallel.expert)
    kept = []
    for replica in range(16 // parallel.context):
        mesh, total = mesh_coordinates(parallel, world, replica * parallel.context * parallel.tensor), 0
        for group in plan_groups(held, mesh):
            axis = mesh.expert_data if group.expert_sharded else mesh.data_context
            size = group.partition(axis.size)
            owners = np.repeat(np.arange(len(group.parameters)), [one.numel for one in group.parameters])
            own = set(owners[axis.rank * size : (axis.rank + 1) * size].tolist())
            total += sum(group.parameters[i].numel for i in own)
        kept.append(total)
    mesh = mesh_coordinates(parallel, world, 0)
    assert kept_gradients(plan_groups(held, mesh), mesh) == (max(kept), kept.index(max(kept)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("1b", 1_064_028_034),
        ("3b", 3_041_725_186),
        ("10b", 9_981_316_994),
        ("50b", 50_374_247_426),
        ("100b", 99_545_072_130),
        ("500b", 497_849_137_154),
        ("1t", 999_326_352_386),
    ],
)
@pytest.mark.launch  # builds a trillion parameters without storage
def test_the_variants_have_as_many_parameters_as_open_mythos(name, parameters, open_mythos):
    """OpenMythos itself, on the meta device; 1b's count is the one that it publishes."""
    with torch.device("meta"):
        reference = open_mythos.main.OpenMythos(getattr(open_mythos.variants, f"mythos_{name}")())
    assert sum(parameter.numel() for parameter in reference.parameters()) == parameters
    settings: dict[str, Any] = VARIANTS[name]
    assert count_parameters(MythosConfig(**settings, mode="reference")) == parameters
