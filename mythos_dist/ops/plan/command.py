"""What `tools/plan.py` does with its arguments."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mythos_dist.config.fields import kinds_of, show
from mythos_dist.config.layout import layout_problems
from mythos_dist.config.load import load_config, unknown_name
from mythos_dist.config.schema import Config, ParallelConfig, TrainConfig
from mythos_dist.config.tree import Scalar
from mythos_dist.config.variants import VARIANTS
from mythos_dist.errors import UserError
from mythos_dist.ops.plan.clusters import load_cluster
from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.ops.plan.report import advice, as_json, beside, details, table, why_not
from mythos_dist.ops.plan.search import AXES, check_fixed, search, smallest_cluster
from mythos_dist.ops.plan.write import write_config
from mythos_dist.units import count

_OF_TRAIN = ("micro_batch", "recompute")


def run(arguments: Any, configs: Path, dry_run: Callable[..., Any] | None) -> int:
    """Plan and print; returns the exit code. configs: where the variants' files lie; dry_run: `train.dry_run.dry_run`.

    Raises UserError for the user's mistakes.
    """
    arguments.fixed, words = split_fixed(arguments.fixed)
    overrides = [word for word in words if "=" in word]
    arguments.overrides = [*arguments.overrides, *overrides]
    if arguments.config is None and len(overrides) < len(words):
        arguments.config = next(word for word in words if "=" not in word)
    config = read_config(arguments, configs)
    cluster, gpus = load_cluster(arguments.cluster), arguments.gpus
    fixed = read_fixed(arguments.fixed)
    if arguments.as_is:
        if found := layout_problems(config, gpus):
            raise UserError(found)
        estimates, said = [Estimate(config, gpus, cluster, arguments.imbalance)], []
    else:
        check_fixed(config, gpus, fixed)
        found = search(config, gpus, cluster, fixed, arguments.top, arguments.imbalance)
        if not found.best:
            smallest = smallest_cluster(config, gpus, cluster, fixed)
            if arguments.json:
                least = as_json(found.tightest, arguments.tokens) if found.tightest else None
                print(json.dumps({"fits": False, "least": least, "smallest_cluster": smallest}))
            else:
                print("\n".join(why_not(found, smallest)))
            return 1
        estimates, said = found.best, advice(found)
    best = estimates[0]
    measured = dry_run(best.config, gpus, rank_of(best), arguments.imbalance) if dry_run else None
    if arguments.write:
        write_config(best, arguments.write)
    if arguments.json:
        out = {"fits": best.fits, "layouts": [as_json(one, arguments.tokens) for one in estimates], "advice": said}
        print(json.dumps(out | ({"dry_run": vars(measured)} if measured else {})))
    else:
        n_loops, frozen = best.loops
        print(
            f"{arguments.variant or arguments.config}: {gpus} x {cluster.name}, "
            f"{count(config.train.seq_len, 'token')}, {count(config.train.global_batch, 'sequence')} a step, "
            f"{count(n_loops, 'loop')}, {n_loops - frozen} with gradient"
        )
        print("\n".join([*table(estimates), "", *details(best, arguments.tokens), *said]))
        if measured:
            print("\n".join(["", f"rank {rank_of(best)} of {gpus}:", *beside(best, measured)]))
            print(f"the dry run took {measured.seconds:.0f} s")
        if not best.fits:
            print(f"does not fit: {best.fullest.bytes / 1e9:.1f} GB of {cluster.usable / 1e9:.1f} GB")
    return 0 if best.fits else 1


def rank_of(estimate: Estimate) -> int:
    """The first rank of the stage that needs most memory."""
    return estimate.fullest.mesh.pipe.rank * estimate.config.parallel.tensor


def read_config(arguments: Any, configs: Path) -> Config:
    """The file or the variant's, with what the command line says of length, batch and loops."""
    if (arguments.config is None) == (arguments.variant is None):
        raise UserError("give a config file or --variant, one of the two")
    if arguments.variant is not None and arguments.variant not in VARIANTS:
        raise UserError(f"--variant {arguments.variant}: {unknown_name(arguments.variant, VARIANTS, 'variant')}")
    more = {
        "train.seq_len": arguments.seq_len,
        "train.global_batch": arguments.global_batch,
        "loops.mean": arguments.loops,
        "loops.backprop": arguments.backprop,
    }
    path = arguments.config or configs / f"{arguments.variant}.yaml"
    overrides = [*arguments.overrides, *(f"{key}={value}" for key, value in more.items() if value is not None)]
    if arguments.global_batch is not None or not arguments.as_is:
        overrides.append("train.micro_batch=1")  # else it would have to divide the batch; a search chooses another
    return load_config(path, ["data.path=shards", *overrides])


def split_fixed(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """--fixed takes all words up to the next option: those that are its own, and the config and overrides."""
    own = [text for text in texts if not _belongs_elsewhere(text)]
    return own, [text for text in texts if _belongs_elsewhere(text)]


def _belongs_elsewhere(text: str) -> bool:
    name, equals, _ = text.partition("=")
    return "." in name if equals else name.endswith((".yaml", ".yml"))


def read_fixed(texts: Sequence[str]) -> Mapping[str, Any]:
    """`tensor=16 recompute=loop` -> values by name. Raises UserError with all that is wrong."""
    fixed: dict[str, Any] = {}
    found = []
    for text in (part for one in texts for part in one.split(",") if part):
        name, equals, raw = text.partition("=")
        if name not in AXES:
            found.append(f"--fixed {text[:80]}: {unknown_name(name, AXES, 'name')}")
            continue
        kind = kinds_of(TrainConfig if name in _OF_TRAIN else ParallelConfig)[name]
        try:
            value = kind.read(Scalar(raw, plain=bool(equals)))
            problem = kind.problem(value)
        except ValueError as error:
            value, problem = None, f": expected {error}"
        if problem:
            found.append(f"--fixed {name}={show(value if value is not None else raw)}{problem}")
        elif fixed.get(name, value) != value:
            found.append(f"--fixed {name}={fixed[name]} and {name}={value} contradict each other; leave one out")
        else:
            fixed[name] = value
    if found:
        raise UserError(found)
    return fixed
