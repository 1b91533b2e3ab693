"""Which nodes a run gets and how many ranks go on each, and whether a config's layout fits there.

    python -m mythos_dist.ops.cluster.allocation CONFIG.yaml [section.key=value ...] --ranks N [--nodes M]
    python -m mythos_dist.ops.cluster.allocation CONFIG.yaml [section.key=value ...] --hostfile FILE

is what the launch scripts ask before they start anything: it prints run.dir, or leaves with exit code 2 and all that is
wrong. The trap: it runs once per start on a node whose GPUs wait, so it must answer in a second: nothing here imports
torch.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mythos_dist.config.arguments import add_config, parse_arguments
from mythos_dist.config.layout import divisors, layout_problems, nearest
from mythos_dist.config.load import dump_config, load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import EXIT_USER_ERROR, UserError, run_command
from mythos_dist.units import count

T = TypeVar("T")
MAX_COUNT = 100_000  # of nodes, of ranks on one, and of jobs in a chain: more is a slip
_HOST_RULE = "use letters, digits, dots, hyphens and underscores, such as node1 or user@node1.cluster (no IPv6 address)"


@dataclass(frozen=True)
class Allocation:
    """Nodes, and as many ranks on each."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int | None = None  # None: not known, or CPUs compute
    hosts: tuple[str, ...] = field(default=(), compare=False)  # their names, where a hostfile gives them

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def read_hostfile(path: str | Path) -> Allocation:
    """The hosts of a file of DeepSpeed's form: `HOST slots=N` a line, `#` for comments.

    Raises UserError with all problems: lines of another form, names that are no host's, a host that stands twice, hosts
    with different slots.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {path} cannot be read: {error}; see hostfile.example") from None
    slots: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()  # DeepSpeed too stops reading a line after its number
        if not line:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if not found:
            problems.append(f"line {number}: {line!r} is not of the form `HOST slots=N`, such as `node1 slots=8`")
        elif not is_host(found[1]):
            problems.append(f"line {number}: {found[1]!r} is no host name: {_HOST_RULE}")
        elif len(found[2]) > 6 or not 1 <= int(found[2]) <= MAX_COUNT:
            what = "gives no rank" if not found[2].strip("0") else f"gives more than {MAX_COUNT:,} ranks"
            problems.append(f"line {number}: {line[:300]!r} {what}; leave the host out, or set slots to 1 or more")
        elif found[1] in slots:
            problems.append(f"line {number}: {found[1]} stands there a second time; one line per host")
        else:
            slots[found[1]] = int(found[2])
    if not slots and not problems:
        problems.append("names no host; write a line like `node1 slots=8` for each")
    problems += _uneven(slots)
    if problems:
        raise UserError(problems, source=str(path))
    return Allocation(len(slots), next(iter(slots.values())), hosts=tuple(slots))


def is_host(name: str) -> bool:
    """Whether it may go into the command lines of shells, ssh, pdsh and mpirun: a name or an IPv4 address.

    They read more into other characters: commands, options, lists and patterns of hosts, other ways to reach one.
    """
    word = r"[A-Za-z0-9_][\w.-]{0,254}"
    return re.fullmatch(f"({word}@)?{word}", name, re.ASCII) is not None


def _uneven(slots: dict[str, int]) -> list[str]:
    """Every host whose number of ranks is not that of the most hosts."""
    counts = Counter(slots.values()).most_common()
    if len(counts) < 2:
        return []
    usual = counts[0][0]
    others = [host for host, number in slots.items() if number == usual]
    most = f"{others[0]} has" if len(others) == 1 else f"{others[0]} and {len(others) - 1} more have"
    return [
        f"{host} has slots={number}, but {most} slots={usual}: every node runs equally many ranks; "
        f"set its slots to {usual}, leave {host} out, or set all to {min(slots.values())}"
        for host, number in slots.items()
        if number != usual
    ]


def even_allocation(ranks: int, nodes: int, gpus_per_node: int | None = None) -> Allocation:
    """`ranks` on `nodes`. Raises UserError if they cannot be dealt out evenly, or a node lacks GPUs for them."""
    if ranks < 1 or nodes < 1:
        raise UserError(f"{count(ranks, 'rank')} on {count(nodes, 'node')}: give at least one of each")
    if not 1 <= nodes <= MAX_COUNT or not 1 <= ranks <= nodes * MAX_COUNT:
        raise UserError(
            f"{ranks} ranks on {nodes} nodes: give at most {MAX_COUNT:,} nodes, and {MAX_COUNT:,} ranks on each"
        )
    if gpus_per_node is not None and not 1 <= gpus_per_node <= MAX_COUNT:
        raise UserError(f"{gpus_per_node} GPUs per node: give 1 to {MAX_COUNT:,}, or leave it out to compute on CPUs")
    if ranks % nodes:
        around = nearest(ranks, range(nodes, ranks + nodes + 1, nodes))
        raise UserError(
            f"{count(ranks, 'rank')} on {count(nodes, 'node')}: every node runs equally many; set the number of ranks "
            f"to one of {around}"
        )
    if gpus_per_node and ranks // nodes > gpus_per_node:
        raise UserError(
            f"{count(ranks // nodes, 'rank')} per node, but a node gives {count(gpus_per_node, 'GPU')}: each rank "
            f"takes one of its own; set the ranks per node to {gpus_per_node} (SLURM: --ntasks-per-node), or ask for "
            "more GPUs"
        )
    return Allocation(nodes, ranks // nodes, gpus_per_node)


def check_allocation(config: Config, allocation: Allocation, source: str) -> list[str]:
    """Notes about a layout that fits, a line each. Raises UserError, with all problems, if it does not."""
    problems = layout_problems(config, allocation.ranks)
    if problems:
        raise UserError([*problems, _fitting(config, allocation)], source=source)
    return layout_notes(config, allocation)


def _fitting(config: Config, allocation: Allocation) -> str:
    """How many such nodes would do, as a sentence."""
    per_node = allocation.ranks_per_node
    replica = config.parallel.pipe * config.parallel.tensor
    # A replica more than there are micro-batches would have nothing to do.
    most = replica * (config.train.global_batch // config.train.micro_batch)
    ranks = [replica * replicas for replicas in divisors(config.train.global_batch // config.train.micro_batch)]
    fitting = [n // per_node for n in ranks if n % per_node == 0 and not layout_problems(config, n)]
    said = (
        f"{count(allocation.nodes, 'node')} x {count(per_node, 'rank')} = {count(allocation.ranks, 'rank')} do not fit"
    )
    if allocation.ranks > most:
        said += (
            f", and this layout can use {most} at most (parallel.pipe x parallel.tensor x train.global_batch / "
            "train.micro_batch)"
        )
    choices = nearest(allocation.nodes, fitting)
    if not choices:
        ranks_each = count(per_node, "rank")
        return f"{said}; no number of nodes with {ranks_each} each does: change the ranks per node, or the layout"
    return f"{said}; set the number of nodes to {choices[0] if len(choices) == 1 else f'one of {choices}'}"


def layout_notes(config: Config, allocation: Allocation) -> list[str]:
    """What works but wastes: groups of ranks that lie on more nodes than they need, and GPUs without a rank."""
    found = []
    per_node, gpus = allocation.ranks_per_node, allocation.gpus_per_node
    if gpus and gpus > per_node:
        found.append(
            f"{count(gpus, 'GPU')} per node, but {count(per_node, 'rank')}: {count(gpus - per_node, 'GPU')} of each "
            f"node {'stays' if gpus - per_node == 1 else 'stay'} idle"
        )
    tensor, pipe = config.parallel.tensor, config.parallel.pipe
    for name, size in (("parallel.tensor", tensor), ("parallel.pipe x parallel.tensor", pipe * tensor)):
        if allocation.nodes > 1 and _nodes_of_group(size, allocation) > -(-size // per_node):
            found.append(
                f"{name}={size} and {count(per_node, 'rank')} per node: some of these groups of {size} neighbouring "
                f"ranks lie on {_nodes_of_group(size, allocation)} nodes where {-(-size // per_node)} would do, and "
                "the network between nodes is slower; choose them so that one divides the other"
            )
            break
    if tensor > per_node:
        found.append(
            f"parallel.tensor={tensor} is more than the {count(per_node, 'rank')} of a node: a few messages per loop "
            "cross the network; parallel.pipe or parallel.zero=3 divide a model with fewer"
        )
    return found


def _nodes_of_group(size: int, allocation: Allocation) -> int:
    """On how many nodes the ranks of a group are at most, with ranks counted node by node."""
    per_node = allocation.ranks_per_node
    groups = range(0, allocation.ranks, size)
    return max((first + size - 1) // per_node - first // per_node + 1 for first in groups)


def is_finished(config: Config) -> bool:
    """Whether the run in run.dir has done what this config asks for: the marker is there, and train.steps was not
    raised since.

    The marker alone does not say so: until a new start has come far enough to take it away, it is the old run's.
    """
    run_dir = Path(config.run.dir)
    if not (run_dir / "COMPLETED").exists():
        return False
    try:
        newest = (run_dir / "checkpoints" / "latest").read_text().strip()
    except (OSError, ValueError):
        return True  # checkpoints were moved away: of a finished run nobody needs them
    step = newest.rpartition("-")[2]
    return not step.isdecimal() or int(step) >= config.train.steps


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mythos_dist.ops.cluster.allocation",
        description="Does a config fit on these ranks? Prints its run.dir; exit code 2 and what is wrong if not.",
    )
    add = parser.add_argument
    add_config(parser, "a YAML file, such as configs/1b.yaml")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--ranks", type=int, help="processes, over all nodes")
    where.add_argument("--hostfile", help="instead of --ranks and --nodes: a file of lines `HOST slots=N`")
    where.add_argument("--finished", action="store_true", help="only say by exit code 0 or 1 if the run is done")
    where.add_argument("--write", type=Path, metavar="FILE", help="only write the whole config there")
    where.add_argument("--hosts", metavar="HOSTFILE", help="only print its hosts and slots, `HOST slots=N` a line")
    add("--nodes", type=int, default=1, help="that the ranks are spread evenly over (%(default)s)")
    add("--gpus-per-node", type=int, help="that the scheduler gives")
    return parse_arguments(parser, arguments)


def main() -> None:
    """Check; see the top of this file."""
    arguments = parse()
    errors: list[UserError] = []
    config = _tried(errors, lambda: load_config(arguments.config, arguments.overrides))
    if config and arguments.finished:
        sys.exit(0 if is_finished(config) else 1)
    if config and arguments.write:
        arguments.write.write_text(dump_config(config))
        return
    allocation = said = None
    if arguments.hosts or arguments.hostfile:
        allocation = _tried(errors, lambda: read_hostfile(arguments.hosts or arguments.hostfile))
    elif arguments.ranks is not None:
        allocation = _tried(errors, lambda: even_allocation(arguments.ranks, arguments.nodes, arguments.gpus_per_node))
    if config and allocation:
        said = _tried(errors, lambda: check_allocation(config, allocation, arguments.config))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors or not config:
        sys.exit(EXIT_USER_ERROR)
    if allocation and arguments.hosts:
        print("\n".join(f"{host} slots={allocation.ranks_per_node}" for host in allocation.hosts))
        return
    for line in said or []:
        print(f"note: {line}", file=sys.stderr)
    print(config.run.dir)


def _tried(errors: list[UserError], step: Callable[[], T]) -> T | None:
    """What `step` returns; None if it raised one more of `errors`."""
    try:
        return step()
    except UserError as error:
        errors.append(error)
        return None


if __name__ == "__main__":
    run_command(main)
