"""What a rank holds by formula, against the real model on the meta device."""

import pytest
import torch

from mythos_dist.config.schema import Config, OptimConfig, ParallelConfig
from mythos_dist.config.variants import VARIANTS
from mythos_dist.model import Mythos, MythosConfig
from mythos_dist.model.flops import stage_costs
from mythos_dist.model.parameter_groups import parameter_groups
from mythos_dist.ops.plan.cost import count_parameters
from mythos_dist.ops.plan.parameters import Weight, group_sizes, weights_of
from mythos_dist.parallel.mesh import Mesh, mesh_of
from mythos_dist.parallel.pipeline import StageSpec, plan_stages

# Little divides by three or five: heads of keys and values, widths, the vocabulary, the rank of the depth LoRA.
ODD = {
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
    MythosConfig(**ODD, prelude_layers=1),
    MythosConfig(**ODD, lora="per_loop", injection="parcae", qk_norm=True),
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


def parts_of(config: MythosConfig, stages: int) -> list[StageSpec]:
    return plan_stages(config, config.max_loop_iters, stages, stage_costs(Config(model=config)))


def build(config: MythosConfig, mesh: Mesh, part: StageSpec) -> Mythos:
    with torch.device("meta"):
        return Mythos(config, mesh=mesh, stage=part)


def held(model: Mythos) -> list[Weight]:
    """What the formula has to give."""
    return [
        Weight(name, p.numel(), getattr(p, "tensor_model_parallel", False), not getattr(p, "allreduce", True))
        for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_each_stage_of_the_variants_holds_what_the_model_has(name):
    """Names in order, numbers and marks of all weights, for the first rank of every stage."""
    config = MythosConfig(**VARIANTS[name])
    for parallel in LARGE_LAYOUTS:
        world = parallel.tensor * parallel.pipe * parallel.expert
        for stage, part in enumerate(parts_of(config, parallel.pipe)):
            mesh = mesh_of(parallel, world, stage * parallel.tensor)
            assert weights_of(config, parallel.tensor, parallel.expert, part) == held(build(config, mesh, part))


@pytest.mark.parametrize("parallel", ODD_LAYOUTS)
@pytest.mark.parametrize("config", ODD_CONFIGS)
def test_every_rank_holds_as_much_where_nothing_divides(config, parallel):
    """All ranks of a replica and its experts, the last of each axis with padding only, included."""
    world = parallel.tensor * parallel.pipe * parallel.expert
    parts = parts_of(config, parallel.pipe)
    for rank in range(world):
        mesh = mesh_of(parallel, world, rank)
        part = parts[mesh.pipe.rank]
        assert weights_of(config, parallel.tensor, parallel.expert, part) == held(build(config, mesh, part))


@pytest.mark.parametrize("parallel", ODD_LAYOUTS)
@pytest.mark.parametrize("config", ODD_CONFIGS)
def test_groups_are_those_of_the_optimizer(config, parallel):
    """Which are spread, each parameter's numbers in order, and the filling of pipelines; every stage, two copies of all
    experts."""
    world = 2 * parallel.tensor * parallel.pipe * parallel.expert
    for stage, part in enumerate(parts_of(config, parallel.pipe)):
        mesh = mesh_of(parallel, world, stage * parallel.tensor)
        model = build(config, mesh, part)
        own = {id(parameter) for parameter in model.parameters()}
        expected = [
            (
                "moe" in group,
                [parameter.numel() for parameter in group["params"] if id(parameter) in own],
                sum(parameter.numel() for parameter in group["params"]),
            )
            for group in parameter_groups(model, OptimConfig(), mesh)
        ]
        weights = weights_of(config, parallel.tensor, parallel.expert, part)
        assert [tuple(group) for group in group_sizes(weights, mesh)] == expected


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
def test_the_variants_have_as_many_parameters_as_the_reference(name, parameters, open_mythos):
    """OpenMythos itself, on the meta device; 1b's is the figure that it publishes."""
    with torch.device("meta"):
        reference = open_mythos.main.OpenMythos(getattr(open_mythos.variants, f"mythos_{name}")())
    assert sum(parameter.numel() for parameter in reference.parameters()) == parameters
    assert count_parameters(MythosConfig(**VARIANTS[name], mode="reference")) == parameters
