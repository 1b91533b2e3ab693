"""The nodes of a run and the number of ranks on each, and whether the layout of each stage of a config fits on them.

    python -m mythos_dist.ops.cluster.allocation CONFIG.yaml [section.key=value ...] --ranks N [--nodes M]
    python -m mythos_dist.ops.cluster.allocation CONFIG.yaml [section.key=value ...] --hostfile FILE

The launch scripts run this before they start ranks: it prints run.dir, or exits with code 2 and prints all problems.
The trap: GPUs are idle while it runs at every start, so it must take at most a second and not import torch.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mythos_dist.config.arguments import add_config, parse_arguments
from mythos_dist.config.dump import dump_stages
from mythos_dist.config.layout import divisors, layout_problems, nearest
from mythos_dist.config.load import load_stages
from mythos_dist.config.schema import Config
from mythos_dist.config.stages import lines_by_stage
from mythos_dist.errors import EXIT_USER_ERROR, UserError, run_command
from mythos_dist.files import write_atomically
from mythos_dist.ops.cluster.hostfile import MAX_COUNT, read_slots
from mythos_dist.units import count

T = TypeVar("T")


@dataclass(frozen=True)
class Allocation:
    """Nodes with the same number of ranks on each."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int | None = None  # None: unknown, or the run uses CPUs
    hosts: tuple[str, ...] = field(default=(), compare=False)  # host names, if they come from a hostfile

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def read_hostfile(path: str | Path) -> Allocation:
    """Raises UserError with all problems of the hostfile."""
    slots = read_slots(path)
    return Allocation(len(slots), next(iter(slots.values())), hosts=tuple(slots))


def even_allocation(ranks: int, nodes: int, gpus_per_node: int | None = None) -> Allocation:
    """Raises UserError if the ranks cannot be distributed evenly, or a node has fewer GPUs than ranks."""
    if ranks < 1 or nodes < 1:
        raise UserError(f"{count(ranks, 'rank')} on {count(nodes, 'node')}: give at least one of each")
    if not 1 <= nodes <= MAX_COUNT or not 1 <= ranks <= nodes * MAX_COUNT:
        raise UserError(
            f"{count(ranks, 'rank')} on {count(nodes, 'node')}: give at most {MAX_COUNT:,} nodes, and {MAX_COUNT:,} "
            "ranks on each"
        )
    if gpus_per_node is not None and not 1 <= gpus_per_node <= MAX_COUNT:
        raise UserError(f"{gpus_per_node} GPUs per node: give 1 to {MAX_COUNT:,}, or omit it to use CPUs")
    if ranks % nodes:
        around = nearest(ranks, range(nodes, ranks + nodes + 1, nodes))
        raise UserError(
            f"{count(ranks, 'rank')} on {count(nodes, 'node')}: every node must run the same number of ranks; set the "
            f"number of ranks to one of {around}"
        )
    if gpus_per_node and ranks // nodes > gpus_per_node:
        raise UserError(
            f"{count(ranks // nodes, 'rank')} per node, but only {count(gpus_per_node, 'GPU')}: each rank needs its "
            f"own GPU; set the ranks per node to {gpus_per_node} (SLURM: --ntasks-per-node), or request more GPUs"
        )
    return Allocation(nodes, ranks // nodes, gpus_per_node)


def check_allocation(stages: Sequence[Config], allocation: Allocation, source: str) -> list[str]:
    """Notes about layouts that fit. Raises UserError, with all problems of `source`, if that of a stage does not fit.

    stages: as `load_stages` returns them.
    """
    problems = list(lines_by_stage([(one.run.stage, layout_problems(one, allocation.ranks)) for one in stages]))
    if problems:
        raise UserError([*problems, _suggest_nodes(stages, allocation)], source=source)
    return list(lines_by_stage([(one.run.stage, layout_notes(one, allocation)) for one in stages]))


def _suggest_nodes(stages: Sequence[Config], allocation: Allocation) -> str:
    """The nearest numbers of nodes with which the layouts of all stages would fit, as a sentence."""
    per_node = allocation.ranks_per_node
    config = min(stages, key=lambda one: one.parallel.ranks_per_replica * _max_replicas(one))
    max_ranks = config.parallel.ranks_per_replica * _max_replicas(config)
    ranks, verb = count(allocation.ranks, "rank"), "does" if allocation.ranks == 1 else "do"
    problem = f"{count(allocation.nodes, 'node')} x {count(per_node, 'rank')} = {ranks} {verb} not fit"
    if allocation.ranks > max_ranks:
        axes = ["pipe", "context", "tensor"] if config.parallel.context > 1 else ["pipe", "tensor"]
        problem += (
            f", and {f'the layout of stage {config.run.stage}' if config.run.stage else 'this layout'} can use at most "
            f"{max_ranks} ({' x '.join(f'parallel.{axis}' for axis in axes)} x "
            f"{'the first batch of train.batch_ramp' if config.train.batch_ramp else 'train.global_batch'} / "
            "train.micro_batch)"
        )
    fitting_nodes = []
    for replicas in divisors(_max_replicas(config)):
        ranks = config.parallel.ranks_per_replica * replicas
        if ranks % per_node == 0 and not any(layout_problems(one, ranks) for one in stages):
            fitting_nodes.append(ranks // per_node)
    choices = nearest(allocation.nodes, fitting_nodes)
    if not choices:
        ranks_each = count(per_node, "rank")
        return f"{problem}; no number of nodes with {ranks_each} each does: change the ranks per node, or the layout"
    return f"{problem}; set the number of nodes to {choices[0] if len(choices) == 1 else f'one of {choices}'}"


def _max_replicas(config: Config) -> int:
    """Micro-batches of the smallest step: each replica needs at least one."""
    return min(config.train.batch_sizes) // config.train.micro_batch


def layout_notes(config: Config, allocation: Allocation) -> list[str]:
    """What works but is inefficient: groups that span more nodes than necessary, and unused GPUs."""
    notes = []
    per_node, gpus = allocation.ranks_per_node, allocation.gpus_per_node
    if gpus and gpus > per_node:
        unused = gpus - per_node
        notes.append(
            f"{count(gpus, 'GPU')} per node, but {count(per_node, 'rank')}: {count(unused, 'GPU')} of each node "
            f"{'stays' if unused == 1 else 'stay'} idle"
        )
    tensor, context, pipe = config.parallel.tensor, config.parallel.context, config.parallel.pipe
    groups = {"parallel.tensor": tensor}
    if context > 1:
        groups["parallel.context x parallel.tensor"] = context * tensor
        groups["parallel.pipe x parallel.context x parallel.tensor"] = pipe * context * tensor
    else:
        groups["parallel.pipe x parallel.tensor"] = pipe * tensor
    for name, size in groups.items():
        needed, spanned = -(-size // per_node), _nodes_per_group(size, allocation)
        if allocation.nodes > 1 and spanned > needed:
            notes.append(
                f"{name}={size} and {count(per_node, 'rank')} per node: some groups of {size} consecutive ranks span "
                f"{spanned} nodes where {needed} would do, and the network between nodes is slower; choose values of "
                "which one divides the other"
            )
            break
    if tensor > per_node:
        notes.append(
            f"parallel.tensor={tensor} is more than the {count(per_node, 'rank')} of a node: several collectives per "
            "loop cross the network; parallel.pipe or parallel.zero=3 shard a model with fewer"
        )
    return notes


def _nodes_per_group(size: int, allocation: Allocation) -> int:
    """The most nodes that a group of `size` consecutive ranks spans."""
    per_node = allocation.ranks_per_node
    groups = range(0, allocation.ranks, size)
    return max((first + size - 1) // per_node - first // per_node + 1 for first in groups)


def is_completed(config: Config) -> bool:
    """Whether the run in run.dir has trained until `config.end`.

    COMPLETED alone does not say so: after train.steps was raised, the file remains until the new start removes it.
    """
    run_dir = Path(config.run.dir)
    try:
        steps = (run_dir / "COMPLETED").read_text().strip()
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    if steps.isdecimal():
        return int(steps) >= config.end
    try:  # the marker of earlier versions is empty
        newest = (run_dir / "checkpoints" / "latest").read_text().strip()
    except (OSError, ValueError):
        return True  # its checkpoints were moved away
    step = newest.rpartition("-")[2]
    return not step.isdecimal() or int(step) >= config.train.steps


def allocation_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mythos_dist.ops.cluster.allocation",
        description="Check that a config fits on these ranks and print its run.dir; exit with code 2 if it does not.",
    )
    add = parser.add_argument
    add_config(parser, "a YAML file, such as configs/1b.yaml")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--ranks", type=int, help="number of ranks on all nodes together")
    mode.add_argument("--hostfile", help="instead of --ranks and --nodes: a file of lines `HOST slots=N`")
    mode.add_argument(
        "--completed", action="store_true", help="only exit with code 0 if the run is completed, else with 1"
    )
    mode.add_argument("--write", type=Path, metavar="FILE", help="only write the config with its overrides to FILE")
    mode.add_argument("--hosts", metavar="HOSTFILE", help="only check HOSTFILE and print it as lines `HOST slots=N`")
    add("--nodes", type=int, default=1, help="number of nodes with the same number of ranks each (%(default)s)")
    add("--gpus-per-node", type=int, help="GPUs that the scheduler allocates on each node")
    return parse_arguments(parser, arguments)


def main() -> None:
    """See the top of this file."""
    arguments = allocation_arguments()
    errors: list[UserError] = []
    stages = _collect_error(errors, lambda: load_stages(arguments.config, arguments.overrides))
    if stages and arguments.completed:
        sys.exit(0 if is_completed(stages[-1]) else 1)
    if stages and arguments.write:
        write_atomically(arguments.write, dump_stages(stages))
        return
    allocation = notes = None
    if arguments.hosts or arguments.hostfile:
        allocation = _collect_error(errors, lambda: read_hostfile(arguments.hosts or arguments.hostfile))
    elif arguments.ranks is not None:
        gpus = arguments.gpus_per_node
        allocation = _collect_error(errors, lambda: even_allocation(arguments.ranks, arguments.nodes, gpus))
    if stages and allocation:
        notes = _collect_error(errors, lambda: check_allocation(stages, allocation, arguments.config))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors or not stages:
        sys.exit(EXIT_USER_ERROR)
    if allocation and arguments.hosts:
        print("\n".join(f"{host} slots={allocation.ranks_per_node}" for host in allocation.hosts))
        return
    for note in notes or []:
        print(f"note: {note}", file=sys.stderr)
    print(stages[0].run.dir)


def _collect_error(errors: list[UserError], function: Callable[[], T]) -> T | None:
    """The result of `function`. If it raises UserError, that is appended to `errors`, and the result is None."""
    try:
        return function()
    except UserError as error:
        errors.append(error)
        return None


if __name__ == "__main__":
    run_command(main)
