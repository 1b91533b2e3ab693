"""Initial values."""

import pytest
import torch
from helpers.selection import first_is_quick
from torch import Tensor, nn

from mythos_dist.config.schema import MythosConfig, ParallelConfig
from mythos_dist.model import Mythos
from mythos_dist.model.init import STD, init_parameters, normal_block
from mythos_dist.parallel.mesh import Axis, mesh_coordinates
from mythos_dist.parallel.pipeline import LayerCosts, plan_stages
from mythos_dist.parallel.tensor import shard_of, shard_parameter


def test_values_depend_on_the_seed_and_the_name_only(tiny):
    """The global generator and the order of construction do not matter; another seed changes every matrix."""
    config = tiny()
    torch.manual_seed(1)
    first = dict(Mythos(config, seed=3).named_parameters())
    torch.manual_seed(2)
    again = dict(Mythos(config, seed=3).named_parameters())
    other = dict(Mythos(config, seed=4).named_parameters())
    deeper = dict(Mythos(tiny(prelude_layers=3), seed=3).named_parameters())
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, deeper[name])
        if value.dim() > 1 and not name.endswith("norm.weight"):
            assert not (value == other[name]).any()


def test_no_two_parameters_have_the_same_values(tiny):
    """Equal shapes under different names are drawn from different seeds."""
    model = Mythos(tiny(prelude_layers=2))
    tables = [p.flatten()[:16] for n, p in model.named_parameters() if p.dim() > 1]
    firsts = {tuple(t.tolist()) for t in tables}
    assert len(firsts) == len(tables) > 20


def test_a_block_drawn_alone_equals_its_slice_of_the_tensor():
    """A table of 3,000,000 values takes three generators; the second block is drawn without the others.

    No two blocks are alike: of a million pairs of random numbers hardly any is equal.
    """
    table = nn.Module()
    table.weight = nn.Parameter(torch.empty(3000, 1000))
    init_parameters(table, seed=5, config=MythosConfig())
    rows = 2**20 // 1000
    assert torch.equal(table.weight[rows : 2 * rows], STD * normal_block(5, "weight", 1, rows, 1000))
    assert (table.weight[:rows] == table.weight[rows : 2 * rows]).double().mean() < 1e-3
    tail = 3000 - 2 * rows
    assert torch.equal(table.weight[2 * rows :], STD * normal_block(5, "weight", 2, tail, 1000))


def test_matrices_are_normal_with_the_references_std(build_reference, tiny):
    """Over 600,000 values the sample's deviation and mean lie within 1 % of 0.02, and tails are normal ones.

    The reference's own draw of the same model is held to the same bounds.
    """
    config = tiny(dim=128, vocab_size=500, n_experts=16, expert_dim=64)
    for model in (Mythos(config), build_reference(config)):
        values = torch.cat(
            [p.detach().flatten() for n, p in model.named_parameters() if p.dim() > 1 and "norm" not in n]
        )
        assert values.numel() > 600_000
        assert values.std().item() == pytest.approx(0.02, rel=0.01)
        assert abs(values.mean().item()) < 0.01 * 0.02
        beyond = (values.abs() > 2 * 0.02).double().mean().item()
        assert beyond == pytest.approx(0.0455, rel=0.05)  # a normal variable beyond two deviations
    assert STD == 0.02


def test_norms_injection_and_halting_start_where_the_reference_does(build_reference, tiny):
    """All that is not drawn: equal to a fresh reference, but for the halting bias, which it draws and we set to 0."""
    config = tiny()
    reference = dict(build_reference(config).named_parameters())
    compared = 0
    for name, value in Mythos(config).named_parameters():
        if value.dim() == 1 and name != "recurrent.act.halt.bias":
            assert torch.equal(value, reference[name]), name
            compared += 1
    assert compared > 10


def test_a_model_on_the_meta_device_stays_there(tiny):
    """Nothing is drawn before it has storage."""
    with torch.device("meta"):
        model = Mythos(tiny())
    assert all(p.is_meta for p in model.parameters())
    real = model.to_empty(device="cpu")
    init_parameters(real, seed=7, config=tiny())
    for ours, fresh in zip(real.parameters(), Mythos(tiny(), seed=7).parameters(), strict=True):
        assert torch.equal(ours, fresh)


class Assembly:
    """Unsharded tensors from the shards of many ranks. Ranks that hold the same elements must agree."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, parameter: Tensor) -> None:
        """Copy the parameter's shard to its position in the full tensor."""
        part, value = shard_of(parameter), parameter.detach().clone()
        shard = value[tuple(slice(size) for size in part.shape)].clone()
        value[tuple(slice(size) for size in part.shape)] = 0.0
        assert not value.any(), f"{name}: the padding after the shard is not zero"
        full = self.tensors.setdefault(name, torch.full(part.full_shape, torch.nan))
        target = full[tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))]
        assert bool((target.isnan() | (target == shard)).all()), f"{name}: ranks disagree"
        target.copy_(shard)


LAYOUTS = [
    (tensor, expert, (1, 2, 4)[(tensor + i) % 3]) for tensor in range(1, 6) for i, expert in enumerate((1, 2, 4))
]


@pytest.mark.parametrize("attn_type", first_is_quick(["mla", "gqa"]))
@pytest.mark.parametrize(("tensor", "expert", "pipe"), LAYOUTS)
def test_every_layout_starts_with_the_same_values(tensor, expert, pipe, attn_type, tiny):
    """The ranks' shards together equal the model of one process bit for bit, no element missing or left over.

    Widths do not divide: 515 tokens, latents of 18 and 12 + 4 channels, 42 of the FFN, a LoRA of rank 6, experts 30
    wide, and 2 key heads of 8 channels over up to 5 ranks, the last of which then holds none.
    """
    config = tiny(
        attn_type=attn_type, vocab_size=515, q_lora_rank=18, lora_rank=6, expert_dim=30, n_experts=8, n_kv_heads=2
    )
    parallel = ParallelConfig(tensor=tensor, expert=expert, pipe=pipe)
    parts = plan_stages(config, config.max_loop_iters, pipe, LayerCosts(block=1, loop=1, no_grad_loop=1, head=1))
    world = tensor * expert * pipe
    assembled = Assembly()
    for rank in range(world):
        mesh = mesh_coordinates(parallel, world, rank)
        for name, parameter in Mythos(config, seed=11, mesh=mesh, stage=parts[mesh.pipe.rank]).named_parameters():
            assembled.add(name, parameter)
    expected = dict(Mythos(config, seed=11).named_parameters())
    assert set(assembled.tensors) == set(expected)
    for name, value in expected.items():
        assert torch.equal(assembled.tensors[name], value), name


@pytest.mark.parametrize("mode", ["columns", "rows", "stack"])
def test_shards_across_block_boundaries_equal_the_full_tensor(mode):
    """Tensors of 2 to 3 million values, drawn by several generators each, sharded inside a block.

    A rank that draws only the blocks of its shard gets the values of a process that draws the full tensor.
    """
    shape = {"columns": (3001, 1000), "rows": (3001, 1000), "stack": (7, 301, 1000)}[mode]
    sizes = {"columns": {1: ("tensor", 3)}, "rows": {0: ("tensor", 4)}, "stack": {0: ("expert", 2), 1: ("tensor", 3)}}
    cuts = sizes[mode]
    table = nn.Module()
    table.weight = nn.Parameter(torch.empty(shape))
    init_parameters(table, seed=5, config=MythosConfig())
    assembled = Assembly()
    indices = torch.cartesian_prod(*(torch.arange(size) for _, size in cuts.values())).view(-1, len(cuts)).tolist()
    for ranks in indices:
        part = nn.Module()
        part.weight = shard_parameter(
            shape, {dim: Axis(name, size, i) for (dim, (name, size)), i in zip(cuts.items(), ranks, strict=True)}
        )
        init_parameters(part, seed=5, config=MythosConfig())
        assembled.add("weight", part.weight)
    assert torch.equal(assembled.tensors["weight"], table.weight)


def test_a_rank_draws_only_the_blocks_of_its_shard(monkeypatch):
    """One of 64 ranks of a table of 40 million values, 39 generators, needs one or two of them."""
    drawn = []
    monkeypatch.setattr(
        "mythos_dist.model.init.normal_block",
        lambda seed, name, block, rows, columns: drawn.append(block) or normal_block(seed, name, block, rows, columns),
    )
    part = nn.Module()
    part.weight = shard_parameter((40_000, 1000), {0: Axis("tensor", 64, 31)})
    init_parameters(part, seed=5, config=MythosConfig())
    assert len(drawn) in (1, 2)
