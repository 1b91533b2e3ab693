"""Muon: single steps against torch.optim.Muon, the matrices against OpenMythos', and the exchange between ranks.

Training with Muon at every layout is in parallel/test_parity_grid.py, resuming at another one in
checkpoint/test_reshape.py.
"""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from helpers.launch import run_ranks
from helpers.parity import Muon, batches, change
from helpers.selection import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos_dist.config.schema import BY_MODE, Config, MythosConfig, OptimConfig, ParallelConfig, TrainConfig
from mythos_dist.model import Mythos
from mythos_dist.model.flops import stage_costs
from mythos_dist.model.matrices import matrices_of
from mythos_dist.model.open_mythos import to_open_mythos
from mythos_dist.model.parameter_groups import GroupSpec, plan_groups
from mythos_dist.model.parameter_table import local_parameters
from mythos_dist.parallel.mesh import SINGLE, mesh_coordinates
from mythos_dist.parallel.pipeline import plan_stages
from mythos_dist.train.matrix_exchange import GroupLayout, Round
from mythos_dist.train.optimizer import build_optimizer, newton_schulz

ODD = MythosConfig(  # sizes that hardly any axis divides
    vocab_size=515,
    dim=40,
    n_heads=4,
    n_kv_heads=2,
    max_loop_iters=3,
    prelude_layers=1,
    coda_layers=1,
    kv_lora_rank=10,
    q_lora_rank=11,
    qk_rope_head_dim=2,
    qk_nope_head_dim=5,
    v_head_dim=3,
    n_experts=6,
    n_shared_experts=2,
    n_experts_per_tok=2,
    expert_dim=7,
    lora_rank=3,
)


@pytest.mark.parametrize("shape", [(8, 8), (12, 40), (40, 12), (1, 16), (16, 1)], ids=str)
def test_newton_schulz_equals_torchs(shape):
    """In bf16, which torch's rounds to, bit for bit; zeros stay zeros."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = _zeropower_via_newtonschulz(matrix.clone(), (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert torch.equal(newton_schulz(matrix, 5), expected)
    assert torch.equal(newton_schulz(torch.zeros(shape), 5), torch.zeros(shape))


def test_noise_of_another_order_of_sums_changes_a_bf16_update_of_low_rank():
    """Why fp32 runs iterate in fp32: noise of 1e-6 in a gradient of rank 16 changes the update by 1e-4 there, and by
    more than 1e-2 in bf16."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 16, generator=generator) @ torch.randn(16, 256, generator=generator)
    noisy = matrix * (1 + 1e-6 * torch.randn(64, 256, generator=generator))
    for dtype, (least, most) in {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-2, 1.0)}.items():
        update, other = (newton_schulz(one.to(dtype), 5).float() for one in (matrix, noisy))
        assert least < (update - other).norm() / update.norm() < most, dtype


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("model", [ODD, dataclasses.replace(ODD, lora="per_loop", attn_type="gqa")], ids=["mla", "gqa"])
def test_steps_on_one_process_equal_torchs(model, nesterov, dtype):
    """Three steps on equal random gradients: weights to 1e-5 of the largest, and momentum.

    torch's Muon gets the matrices of the unfused model; in fp32 it iterates in fp32, too, else it is as it is.
    """
    optim = OptimConfig(name="muon", lr=0.02, muon_momentum=0.9, muon_nesterov=nesterov, weight_decay=0.3)
    config = Config(model=model, optim=optim, train=TrainConfig(dtype=dtype))
    reference, ours = Mythos(model, seed=1), Mythos(model, seed=1)
    names = {name for name, _ in ours.named_parameters() if optim.decays(name)}
    muon, optimizer = Muon(reference, names, config), build_optimizer(ours, config, SINGLE)
    # As ZeRO on one rank: the parameters of a group end to end.
    group = next(group for group in optimizer.param_groups if "matrix_exchange" in group)
    parameters, flats = group["params"], torch.cat([p.detach().flatten() for p in group["params"]])
    padding = flats.new_zeros(-len(flats) % 2)
    flat = torch.nn.Parameter(torch.cat([flats, padding]))
    group["params"] = [flat]
    optimizer.param_groups = [group]
    optimizer.state[flat]["momentum_buffer"] = torch.zeros_like(flat)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        gradients = []
        for parameter in muon.ours.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradients.append(parameter.grad.flatten())
        flat.grad = torch.cat([*gradients, padding])
        group["lr"] = 0.02
        optimizer.step()
        muon.step(0.02)
    sizes = [p.numel() for p in parameters]
    momentum = muon.momentum()
    found = zip(muon.ours, flat.detach().split([*sizes, len(padding)]), strict=False)
    buffers = optimizer.state[flat]["momentum_buffer"].split([*sizes, len(padding)])
    for (name, weights), buffer in zip(found, buffers, strict=False):
        expected = muon.ours[name].detach()
        assert (weights.view_as(expected) - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        assert torch.allclose(buffer.view_as(expected), momentum[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("changed", [{}, {"attn_type": "gqa"}, {"n_shared_experts": 0}, {"n_shared_experts": 1}])
def test_matrices_are_those_of_open_mythos(changed):
    """Of every parameter with weight decay: the same shapes, up to transposed experts, and the same elements."""
    config = dataclasses.replace(ODD, **BY_MODE["reference"], mode="reference", **changed)
    for name, parameter in Mythos(config).named_parameters():
        if not OptimConfig.decays(name):
            continue
        values = torch.arange(parameter.numel()).view(parameter.shape)
        theirs = list(to_open_mythos({name: values}, config).values())
        if name.endswith("experts.w2"):
            theirs = [matrix.T for matrix in theirs]
        ours = [unfused(values, matrix) for matrix in matrices_of(name, tuple(parameter.shape), config)]
        assert all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs), name


def unfused(full: torch.Tensor, matrix: Any) -> torch.Tensor:
    blocks = []
    for start, shape in matrix.blocks:
        box = full[tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))]
        blocks.append(box.reshape(-1, matrix.columns))
    return torch.cat(blocks)


LAYOUTS = st.tuples(
    st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3])
)


@settings(max_examples=examples(25))
@given(LAYOUTS, st.sampled_from(["mla", "gqa"]), st.sampled_from(["shared", "per_loop", "none"]))
def test_the_exchange_gives_owners_full_matrices_and_holders_the_results(layout, attention, lora):
    """On all ranks of a layout, without processes: values are element ids; results are ids plus a matrix's number.

    Every matrix has one owner, no rank owns two in a round, and what is returned reaches every copy.
    """
    tensor, pipe, expert, copies = layout
    config = dataclasses.replace(ODD, attn_type=attention, lora=lora)
    parallel, world = ParallelConfig(tensor=tensor, pipe=pipe, expert=expert), tensor * pipe * expert * copies
    stages = plan_stages(config, 3, pipe, stage_costs(Config(model=config)))
    meshes = [mesh_coordinates(parallel, world, rank) for rank in range(world)]
    by_group: dict[tuple, list[GroupLayout]] = {}
    for mesh in meshes:
        parameters = local_parameters(config, tensor, expert, stages[mesh.pipe.rank])
        for i, spec in enumerate(plan_groups(parameters, mesh)):
            if spec.decays:
                key = (mesh.pipe.rank, i, mesh.expert.rank if spec.expert_sharded else 0)
                by_group.setdefault(key, []).append(GroupLayout(spec, config, mesh))
    for layouts in by_group.values():
        check_exchange(layouts)


def check_exchange(layouts: list[GroupLayout]) -> None:
    """Of the ranks of one group, in order."""
    group, config = layouts[0].group, layouts[0].config
    ids = ids_of(group)
    flats = [range_of(layout, ids) for layout in layouts]
    results = [flat.clone() for flat in flats]
    of_ranks = [layout.rounds() for layout in layouts]
    assert len({len(rounds) for rounds in of_ranks}) == 1
    number, expected = 0, {name: values.clone() for name, values in ids.items()}
    pending = {}
    for parameter in group.parameters:
        for matrix in matrices_of(parameter.name, parameter.full_shape, config):
            if len(parameter.full_shape) == 3 and not holds(layouts[0], parameter, matrix):
                continue
            number += 1
            pending[tuple(unfused(ids[parameter.name], matrix).flatten().tolist())] = number
            for start, shape in matrix.blocks:
                place = tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))
                expected[parameter.name][place] += number / 1024
    for rounds in zip(*of_ranks, strict=True):
        assert len({one.exchanges for one in rounds}) == 1
        for owner, one in enumerate(rounds):
            exchange(owner, one, rounds, flats, results, pending)
    assert not pending, "each matrix had an owner"
    for layout, result in zip(layouts, results, strict=True):
        assert torch.equal(result, range_of(layout, expected))


def exchange(owner: int, one: Round, rounds: Any, flats: Any, results: Any, pending: dict) -> None:
    """What the owner of a matrix gets and returns in one round."""
    for share in rounds[owner].held:
        assert rounds[share.rank].matrix is not None
    if one.matrix is None:
        assert not one.parts
        return
    full = torch.full((one.matrix.rows * one.matrix.columns,), torch.nan, dtype=torch.float64)
    shares = {part.rank: next(s for s in rounds[part.rank].held if s.rank == owner) for part in one.parts}
    assert one.exchanges or set(shares) == {owner}
    for part in one.parts:
        held = shares[part.rank]
        assert (held.sends, held.numel) == (part.sends, part.numel)
        for target, source in zip(part.views, held.views, strict=True):
            if part.sends:
                assert target.of(full).isnan().all(), "sent twice"
                target.of(full).copy_(source.of(flats[part.rank]))
    number = pending.pop(tuple(full.tolist()))
    for part in one.parts:
        for target, source in zip(shares[part.rank].views, part.views, strict=True):
            target.of(results[part.rank]).copy_(source.of(full) + number / 1024)


def ids_of(group: GroupSpec) -> dict[str, torch.Tensor]:
    """A different number for each element of the unsharded parameters."""
    counter = itertools.count(1)
    return {
        p.name: torch.tensor(
            [next(counter) for _ in range(torch.Size(p.full_shape).numel())], dtype=torch.float64
        ).view(p.full_shape)
        for p in group.parameters
    }


def holds(layout: GroupLayout, parameter: Any, matrix: Any) -> bool:
    """Whether a rank has experts that include this one; a stack that is not sharded has all."""
    if "expert" not in parameter.shard_axes.values():
        return True
    experts = range(parameter.shape[0] * layout.mesh.expert.rank, parameter.shape[0] * (layout.mesh.expert.rank + 1))
    return matrix.blocks[0].start[0] in experts


def range_of(layout: GroupLayout, full: dict[str, torch.Tensor]) -> torch.Tensor:
    """A rank's range of the group: shards, padded with zeros, end to end, and the padding of the group."""
    ranks = {"tensor": layout.mesh.tensor.rank, "expert": layout.mesh.expert.rank}
    flats = []
    for p in layout.group.parameters:
        shard = torch.zeros(p.shape, dtype=torch.float64)
        place = tuple(
            slice(ranks[p.shard_axes[dim]] * size, (ranks[p.shard_axes[dim]] + 1) * size)
            if dim in p.shard_axes
            else slice(None)
            for dim, size in enumerate(p.shape)
        )
        part = full[p.name][place]
        shard[tuple(slice(0, size) for size in part.shape)] = part
        flats.append(shard.flatten())
    flat = torch.cat([*flats, torch.zeros(layout.partition * layout.axis.size, dtype=torch.float64)])
    return flat[layout.partition * layout.axis.rank :][: layout.partition].clone()


class LargestOutput(TorchDispatchMode):
    """The most elements that a new tensor has, apart from those in given storages."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, leaf.numel())
        return out


def largest_output(configs: list[Config]) -> list[tuple[int, int]]:
    """On each rank: elements of the largest new tensor in a step's Muon, and of the largest matrix."""
    from mythos_dist.parallel.mesh import build_mesh
    from mythos_dist.train.engine import Engine

    found = []
    for config in configs:
        mesh = build_mesh(config.parallel)
        engine = Engine(config, mesh)
        sizes: list[int] = []

        def step(group: dict, optimizer: Any = engine.optimizer, sizes: list[int] = sizes) -> None:
            (flat,) = group["params"]
            with LargestOutput([flat, flat.grad, optimizer.state[flat]["momentum_buffer"]]) as outputs:
                type(optimizer)._step_matrices(optimizer, group)
            sizes.append(outputs.most)

        engine.optimizer._step_matrices = step
        engine.train_step(next(batches(config, mesh.data.rank, mesh.data.size)), 1)
        matrices = [
            matrix.rows * matrix.columns
            for parameter in local_parameters(config.model)
            if OptimConfig.decays(parameter.name)
            for matrix in matrices_of(parameter.name, parameter.full_shape, config.model)
        ]
        found.append((max(sizes), max(matrices)))
        engine.close()
    return found


@pytest.mark.launch
def test_no_rank_has_more_than_one_full_matrix(config):
    """What an owner and Newton-Schulz have is one matrix at most. A message may be as large as two: it has elements of
    this rank only, of its own matrices and of those that a border of replicas crosses."""
    base = change(
        config, optim=dict(name="muon"), model=dict(n_shared_experts=2), train=dict(global_batch=4, micro_batch=1)
    )
    layouts: list[dict[str, Any]] = [dict(), dict(tensor=2), dict(tensor=2, expert=2), dict(tensor=4)]
    work = [change(base, parallel=layout) for layout in layouts]
    for rank in run_ranks(4, largest_output, work):
        for layout, (most, largest) in zip(layouts, rank, strict=True):
            assert 0 < most <= 2 * largest, layout
