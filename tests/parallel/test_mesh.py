"""Which ranks share what."""

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

AXES = ["data", "pipe", "tensor", "expert", "expert_data"]

blocks = st.integers(1, 4)  # copies of all experts
degrees = st.builds(ParallelConfig, tensor=st.integers(1, 5), pipe=st.integers(1, 4), expert=st.integers(1, 4))


def world_of(parallel: ParallelConfig, copies: int) -> int:
    return copies * parallel.expert * parallel.pipe * parallel.tensor


@given(degrees, blocks)
def test_every_rank_is_on_one_line_of_each_axis(parallel, copies):
    """Lines of an axis are as long as the axis, each rank appears once, in rising order within its line."""
    world = world_of(parallel, copies)
    lengths = {
        "data": copies * parallel.expert,
        "pipe": parallel.pipe,
        "tensor": parallel.tensor,
        "expert": parallel.expert,
        "expert_data": copies,
    }
    lines = axis_groups(parallel, world)
    assert set(lines) == set(AXES)
    for name, length in lengths.items():
        assert Counter(rank for line in lines[name] for rank in line) == Counter(range(world))
        assert {len(line) for line in lines[name]} == {length}
        assert all(line == sorted(line) for line in lines[name])


@given(degrees, blocks)
def test_a_rank_has_the_coordinates_of_its_number(parallel, copies):
    """By divmod: tensor changes fastest, then pipe, then data, and expert is where the replica lies in its block."""
    world = world_of(parallel, copies)
    for rank in range(world):
        rest, tensor = divmod(rank, parallel.tensor)
        data, pipe = divmod(rest, parallel.pipe)
        block, expert = divmod(data, parallel.expert)
        mesh = mesh_of(parallel, world, rank)
        found = {name: getattr(mesh, name).rank for name in AXES}
        assert found == {"data": data, "pipe": pipe, "tensor": tensor, "expert": expert, "expert_data": block}
        assert [getattr(mesh, name).name for name in AXES] == AXES
        assert mesh.data.size == world // (parallel.pipe * parallel.tensor)
        assert (mesh.pipe.size, mesh.tensor.size, mesh.expert.size) == (parallel.pipe, parallel.tensor, parallel.expert)
        assert mesh.expert_data.size == copies
        assert all(getattr(mesh, name).group is None for name in AXES)  # nobody gave it a way to make one


@given(degrees, blocks, st.booleans())
def test_a_place_by_arithmetic_is_that_on_the_lines(parallel, copies, sequence):
    """`mesh_coordinates` against the lists of ranks, for every rank."""
    parallel = replace(parallel, sequence=sequence)
    world = world_of(parallel, copies)
    for rank in range(world):
        assert mesh_coordinates(parallel, world, rank) == mesh_of(parallel, world, rank)


@given(degrees, blocks)
def test_the_ranks_of_a_replica_are_neighbours(parallel, copies):
    """Ranks that no data line joins, told apart by their data coordinate: consecutive numbers, pipe x tensor of them.

    Of these the ranks of a tensor line are consecutive again, so that a tensor group stays within a node.
    """
    world = world_of(parallel, copies)
    lines = axis_groups(parallel, world)
    size = parallel.pipe * parallel.tensor
    for replica in range(world // size):
        assert sorted(line[replica] for line in lines["data"]) == list(range(replica * size, (replica + 1) * size))
    for line in lines["tensor"]:
        assert line == list(range(line[0], line[0] + parallel.tensor))


@given(degrees, blocks)
def test_experts_are_spread_over_neighbouring_replicas(parallel, copies):
    """An expert line is an unbroken piece of one data line; with an expert_data line it has one rank in common.

    So the pieces are the copies of all experts, and each expert_data line takes one rank from every copy.
    """
    world = world_of(parallel, copies)
    lines = axis_groups(parallel, world)
    for data in lines["data"]:
        pieces = [line for line in lines["expert"] if set(line) <= set(data)]
        assert [rank for line in sorted(pieces) for rank in line] == data
        across = [line for line in lines["expert_data"] if set(line) <= set(data)]
        assert len(pieces) == copies
        assert len(across) == parallel.expert
        for piece in pieces:
            assert [len(set(piece) & set(line)) for line in across] == [1] * parallel.expert


@given(degrees, blocks)
def test_groups_are_made_for_axes_of_more_than_one_rank(parallel, copies):
    """`new_group` is called with the rank's own lines, once for each such axis, on every rank equally often.

    Equally often matters: torch names a group by how many a process has made.
    """
    world = world_of(parallel, copies)
    lines = axis_groups(parallel, world)
    calls: list[list[int]] = []
    numbers = set()
    for rank in range(world):
        calls.clear()
        mesh_of(parallel, world, rank, calls.append)  # type: ignore[arg-type]
        assert sorted(calls) == sorted(line for name in AXES for line in lines[name] if rank in line and len(line) > 1)
        numbers.add(len(calls))
    assert len(numbers) == 1


def test_sequence_parallelism_needs_a_tensor_axis():
    """With tensor 1 there is nothing to spread a sequence over, and one process is every axis of size 1."""
    assert mesh_of(ParallelConfig(tensor=2, sequence=True), 2, 1).sequence
    assert not mesh_of(ParallelConfig(tensor=2), 2, 1).sequence
    assert mesh_of(ParallelConfig(sequence=True), 1, 0) == SINGLE


def gather_numbers(layouts: list[ParallelConfig]) -> list[dict[str, list[int]]]:
    """For each layout and axis, the ranks that answer in the axis' group, in the group's order."""
    found = []
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
        found.append(answers)
    return found


@pytest.mark.launch
def test_real_groups_join_the_lines():
    """Six ranks make the groups of six layouts one after the other; a message in each group meets the line's ranks."""
    layouts = [
        ParallelConfig(tensor=3, expert=2),
        ParallelConfig(pipe=3, expert=2),
        ParallelConfig(pipe=3, tensor=2),
        ParallelConfig(expert=3),
        ParallelConfig(expert=6),
        ParallelConfig(pipe=2, expert=3),
    ]
    for rank, found in enumerate(run_ranks(6, gather_numbers, layouts)):
        for parallel, answers in zip(layouts, found, strict=True):
            lines = axis_groups(parallel, 6)
            expected = {name: next(line for line in lines[name] if rank in line) for name in AXES}
            assert answers == {name: line for name, line in expected.items() if len(line) > 1}
