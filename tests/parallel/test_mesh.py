"""The mesh: coordinates of ranks and the process groups of each axis."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.launch import run_ranks
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.config.schema import ParallelConfig
from mythos_dist.parallel.mesh import SINGLE, axis_groups, build_mesh, mesh_coordinates, mesh_of

AXES = ["data", "pipe", "context", "tensor", "expert", "expert_data", "data_context"]

blocks = st.integers(1, 4)  # copies of all experts
small = st.integers(1, 3)
degrees = st.builds(ParallelConfig, tensor=st.integers(1, 5), pipe=st.integers(1, 4), context=small, expert=small)


def replicas_of(parallel: ParallelConfig, copies: int) -> int:
    return copies * math.lcm(parallel.expert, parallel.context) // parallel.context


def world_of(parallel: ParallelConfig, copies: int) -> int:
    return replicas_of(parallel, copies) * parallel.pipe * parallel.context * parallel.tensor


@given(degrees, blocks)
def test_every_rank_is_in_one_group_of_each_axis(parallel, copies):
    """A group has as many ranks as its axis is long, in ascending order, and each rank is in exactly one."""
    world = world_of(parallel, copies)
    replicas = replicas_of(parallel, copies)
    lengths = {
        "data": replicas,
        "pipe": parallel.pipe,
        "context": parallel.context,
        "tensor": parallel.tensor,
        "expert": parallel.expert,
        "expert_data": replicas * parallel.context // parallel.expert,
        "data_context": replicas * parallel.context,
    }
    groups = axis_groups(parallel, world)
    assert set(groups) == set(AXES)
    for name, length in lengths.items():
        assert Counter(rank for group in groups[name] for rank in group) == Counter(range(world))
        assert {len(group) for group in groups[name]} == {length}
        assert all(group == sorted(group) for group in groups[name])


def no_group(ranks: list[int]) -> None:
    """For meshes without process groups."""


@given(degrees, blocks)
def test_coordinates_follow_from_the_rank(parallel, copies):
    """By divmod: tensor varies fastest, then context, pipe, data; expert is the index in data x context among the ranks
    of a copy."""
    world = world_of(parallel, copies)
    for rank in range(world):
        rest, tensor = divmod(rank, parallel.tensor)
        rest, context = divmod(rest, parallel.context)
        data, pipe = divmod(rest, parallel.pipe)
        both = data * parallel.context + context
        block, expert = divmod(both, parallel.expert)
        mesh = mesh_of(parallel, world, rank, no_group)
        coordinates = [getattr(mesh, name).rank for name in AXES]
        assert coordinates == [data, pipe, context, tensor, expert, block, both]
        assert [getattr(mesh, name).name for name in AXES[:-1]] == AXES[:-1]
        assert mesh.data_context.name == ("data" if parallel.context == 1 else "data_context")
        assert mesh.data.size == world // (parallel.pipe * parallel.context * parallel.tensor)
        sizes = (mesh.pipe.size, mesh.context.size, mesh.tensor.size, mesh.expert.size)
        assert sizes == (parallel.pipe, parallel.context, parallel.tensor, parallel.expert)
        assert mesh.global_rank(both, pipe, tensor) == rank
        assert all(getattr(mesh, name).group is None for name in AXES)


@given(degrees, blocks, st.booleans())
def test_coordinates_by_arithmetic_equal_those_of_the_groups(parallel, copies, sequence):
    """`mesh_coordinates` against `mesh_of`, for every rank."""
    parallel = replace(parallel, sequence=sequence)
    world = world_of(parallel, copies)
    for rank in range(world):
        assert mesh_coordinates(parallel, world, rank) == mesh_of(parallel, world, rank, no_group)


@given(degrees, blocks)
def test_the_ranks_of_a_replica_are_consecutive(parallel, copies):
    """Ranks with the same data coordinate are pipe x context x tensor consecutive ranks.

    Among these, the ranks of a tensor group are consecutive, so that the group stays within a node.
    """
    world = world_of(parallel, copies)
    groups = axis_groups(parallel, world)
    size = parallel.pipe * parallel.context * parallel.tensor
    for replica in range(world // size):
        assert sorted(group[replica] for group in groups["data"]) == list(range(replica * size, (replica + 1) * size))
    for group in groups["tensor"]:
        assert group == list(range(group[0], group[0] + parallel.tensor))


@given(degrees, blocks)
def test_experts_are_sharded_over_consecutive_ranks_of_data_and_context(parallel, copies):
    """An expert group is a consecutive part of one data_context group and has one rank in common with an expert_data
    group.

    So each expert group has one copy of all experts, and each expert_data group has one rank of every copy.
    """
    world = world_of(parallel, copies)
    groups = axis_groups(parallel, world)
    for data in groups["data_context"]:
        copies_of_experts = [group for group in groups["expert"] if set(group) <= set(data)]
        assert [rank for group in sorted(copies_of_experts) for rank in group] == data
        across = [group for group in groups["expert_data"] if set(group) <= set(data)]
        assert len(copies_of_experts) == len(data) // parallel.expert
        assert len(across) == parallel.expert
        for copy in copies_of_experts:
            assert [len(set(copy) & set(group)) for group in across] == [1] * parallel.expert


@given(degrees, blocks)
def test_groups_are_created_for_axes_of_more_than_one_rank(parallel, copies):
    """`new_group` is called with the rank's own groups, once per such axis, and equally often on every rank.

    Equally often, because torch names a group by the number of groups that the process has.
    """
    world = world_of(parallel, copies)
    groups = axis_groups(parallel, world)
    calls: list[list[int]] = []
    call_counts = set()
    for rank in range(world):
        calls.clear()
        mesh_of(parallel, world, rank, calls.append)  # type: ignore[arg-type]
        names = AXES if parallel.context > 1 else AXES[:-1]  # else data_context is the data axis
        assert sorted(calls) == sorted(
            group for name in names for group in groups[name] if rank in group and len(group) > 1
        )
        call_counts.add(len(calls))
    assert len(call_counts) == 1


def test_sequence_parallelism_needs_a_tensor_axis():
    """With tensor=1 sequences are not sharded, and one process has every axis of size 1."""
    assert mesh_coordinates(ParallelConfig(tensor=2, sequence=True), 2, 1).sequence
    assert not mesh_coordinates(ParallelConfig(tensor=2), 2, 1).sequence
    assert mesh_coordinates(ParallelConfig(sequence=True), 1, 0) == SINGLE


def gather_ranks(layouts: list[ParallelConfig]) -> list[dict[str, list[int]]]:
    """For each layout and axis, the ranks in the axis's process group, in the group's order."""
    results = []
    for parallel in layouts:
        mesh = build_mesh(parallel)
        answers = {}
        for name in AXES:
            axis = getattr(mesh, name)
            if axis.size > 1:
                numbers = torch.empty(axis.size, dtype=torch.int64)
                dist.all_gather_into_tensor(numbers, torch.tensor([dist.get_rank()]), group=axis.group)
                answers[name] = numbers.tolist()
                assert dist.get_rank(axis.group) == axis.rank
        results.append(answers)
    return results


@pytest.mark.launch
def test_process_groups_have_the_ranks_of_the_mesh():
    """Six ranks create the groups of six layouts in turn; an all-gather in each group returns its ranks."""
    layouts = [
        ParallelConfig(tensor=3, expert=2),
        ParallelConfig(pipe=3, expert=2),
        ParallelConfig(pipe=3, tensor=2),
        ParallelConfig(expert=3),
        ParallelConfig(expert=6),
        ParallelConfig(pipe=2, expert=3),
        ParallelConfig(context=3, expert=2),
        ParallelConfig(context=2, pipe=3),
    ]
    for rank, results in enumerate(run_ranks(6, gather_ranks, layouts)):
        for parallel, answers in zip(layouts, results, strict=True):
            groups = axis_groups(parallel, 6)
            expected = {name: next(group for group in groups[name] if rank in group) for name in AXES}
            expected = {name: group for name, group in expected.items() if len(group) > 1}
            assert answers == expected
