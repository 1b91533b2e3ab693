"""The command of `mythos plan`."""

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
from mythos_dist.model.parameter_groups import kept_gradients, rank_groups
from mythos_dist.ops.plan.clusters import Cluster, load_cluster
from mythos_dist.ops.plan.estimate import Estimate
from mythos_dist.ops.plan.length import longest_length, what_helps
from mythos_dist.ops.plan.memory import micro_batches_at_peak
from mythos_dist.ops.plan.report import advice, as_json, compare, details, does_not_fit, layout_table
from mythos_dist.ops.plan.search import AXES, check_fixed, search, smallest_cluster
from mythos_dist.ops.plan.write import write_config
from mythos_dist.progress import Bar
from mythos_dist.units import count

_TRAIN_SETTINGS = ("micro_batch", "recompute", "chunk_tokens", "offload")


def run(arguments: Any, configs: Path, dry_run: Callable[..., Any] | None) -> int:
    """Plan and print; returns the exit code. configs: the variants' files; dry_run: `ops.dry_run.dry_run`.

    Raises UserError for the user's mistakes.
    """
    arguments.fixed, others = split_fixed(arguments.fixed)
    overrides = [word for word in others if "=" in word]
    arguments.overrides = [*arguments.overrides, *overrides]
    if arguments.config is None and len(overrides) < len(others):
        arguments.config = next(word for word in others if "=" not in word)
    config = read_config(arguments, configs)
    cluster, gpus = load_cluster(arguments.cluster), arguments.gpus
    fixed = read_fixed(arguments.fixed)
    if arguments.as_is:
        if problems := layout_problems(config, gpus):
            raise UserError(problems)
        estimates, advice_lines = [Estimate(config, gpus, cluster, arguments.imbalance)], []
    else:
        check_fixed(config, gpus, fixed)
        result = search(config, gpus, cluster, fixed, arguments.top, arguments.imbalance)
        if not result.best:
            larger = smallest_cluster(config, gpus, cluster, fixed)
            longest, helps = longest_length(config, gpus, cluster, fixed), []
            if longest is not None and result.smallest is not None:
                helps = what_helps(config, gpus, cluster, fixed, result.smallest)
            if arguments.json:
                least = as_json(result.smallest, arguments.tokens) if result.smallest else None
                length = longest and longest.config.train.seq_len
                facts = {"smallest_cluster": larger, "longest_seq_len": length, "helps": helps}
                print(json.dumps({"fits": False, "least": least, **facts}))
            else:
                print("\n".join(does_not_fit(result, larger, longest, helps)))
            return 1
        estimates, advice_lines = result.best, advice(result)
    best = estimates[0]
    measured = _run_dry(dry_run, best, arguments.imbalance) if dry_run else None
    if arguments.write:
        write_config(best, arguments.write)
    if arguments.json:
        layouts = [as_json(estimate, arguments.tokens) for estimate in estimates]
        out = {"fits": best.fits, "layouts": layouts, "advice": advice_lines}
        if measured:
            out["dry_run"] = vars(measured)
        print(json.dumps(out))
    else:
        _print_plan(arguments, cluster, estimates, advice_lines, measured)
    return 0 if best.fits else 1


def _run_dry(dry_run: Callable[..., Any], best: Estimate, imbalance: float) -> Any:
    """The dry run of a rank, with a bar of the planned FLOPs that are done, in percent."""
    total, done = _dry_run_flops(best), 0.0
    with Bar("building the rank", 100, unit=" %") as shown:

        def count_flops(flops: float) -> None:
            nonlocal done
            if not done:
                shown.describe("dry run of a step")
            done += flops
            shown.show(min(100, round(100 * done / total)))

        return dry_run(best.config, best.world_size, rank_of(best), imbalance, on_flops=count_flops)


def _dry_run_flops(estimate: Estimate) -> float:
    """FLOPs of the steps of a dry run, about: before the measured one another, of a pipeline with one loop."""
    config, stage = estimate.config, estimate.largest_stage
    step = estimate.flops(stage, min(estimate.micro_batches, micro_batches_at_peak(config)))
    first = step if config.parallel.zero == 3 else step / max(1, len(stage.loops)) if config.parallel.pipe > 1 else 0
    return first + step


def _print_plan(
    arguments: Any, cluster: Cluster, estimates: Sequence[Estimate], advice_lines: Sequence[str], measured: Any
) -> None:
    best, train = estimates[0], estimates[0].config.train
    n_loops, no_grad = best.loops
    print(
        f"{arguments.variant or arguments.config}: {best.world_size} x {cluster.name}, "
        f"{count(train.seq_len, 'token')}, {count(train.global_batch, 'sequence')} per step, "
        f"{count(n_loops, 'loop')}, {n_loops - no_grad} with gradient"
    )
    print("\n".join([*layout_table(estimates), "", *details(best, arguments.tokens), *advice_lines]))
    if measured:
        print("\n".join(["", f"rank {rank_of(best)} of {best.world_size}:", *compare(best, measured)]))
        print(f"the dry run took {measured.seconds:.0f} s")
    if not best.fits:
        size = best.largest_stage.bytes
        print(f"does not fit: needs {size / 1e9:.1f} GB per GPU, has {cluster.usable / 1e9:.1f} GB")


def rank_of(estimate: Estimate) -> int:
    """The first rank of the stage that needs most memory; with ZeRO-2, of the replica that does."""
    mesh, config = estimate.largest_stage.mesh, estimate.config
    replica = 0
    if config.parallel.zero == 2:
        replica = kept_gradients(rank_groups(config.model, mesh, estimate.largest_stage.spec), mesh).replica
    return mesh.global_rank(replica * mesh.context.size, mesh.pipe.rank, 0)


def read_config(arguments: Any, configs: Path) -> Config:
    """The config of the file or the variant, with the command line's length, batch and loops."""
    if (arguments.config is None) == (arguments.variant is None):
        raise UserError("give a config file or --variant, one of the two")
    if arguments.variant is not None and arguments.variant not in VARIANTS:
        raise UserError(f"--variant {arguments.variant}: {unknown_name(arguments.variant, VARIANTS, 'variant')}")
    options = {
        "train.seq_len": arguments.seq_len,
        "train.global_batch": arguments.global_batch,
        "loops.mean": arguments.loops,
        "loops.backprop": arguments.backprop,
    }
    path = arguments.config or configs / f"{arguments.variant}.yaml"
    overrides = [*arguments.overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]
    if arguments.global_batch is not None or not arguments.as_is:
        overrides.append("train.micro_batch=1")  # else it would have to divide the batch; a search chooses another
    return load_config(path, ["data.path=shards", *overrides])


def split_fixed(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """--fixed takes all words up to the next option: its own settings, and the config file and overrides."""
    own, others = [], []
    for text in texts:
        name, equals, _ = text.partition("=")
        is_other = "." in name if equals else name.endswith((".yaml", ".yml"))
        (others if is_other else own).append(text)
    return own, others


def read_fixed(texts: Sequence[str]) -> Mapping[str, Any]:
    """`tensor=16 recompute=loop` -> values by name. Raises UserError with all problems."""
    fixed: dict[str, Any] = {}
    problems = []
    for text in (part for words in texts for part in words.split(",") if part):
        name, equals, raw = text.partition("=")
        if name not in AXES:
            problems.append(f"--fixed {text[:80]}: {unknown_name(name, AXES, 'name')}")
            continue
        kind = kinds_of(TrainConfig if name in _TRAIN_SETTINGS else ParallelConfig)[name]
        try:
            value = kind.read(Scalar(raw, plain=bool(equals)))
            problem = kind.problem(value)
        except ValueError as error:
            value, problem = None, f": expected {error}"
        if problem:
            problems.append(f"--fixed {name}={show(value if value is not None else raw)}{problem}")
        elif fixed.get(name, value) != value:
            problems.append(f"--fixed {name}={fixed[name]} and {name}={value} contradict each other; remove one")
        else:
            fixed[name] = value
    if problems:
        raise UserError(problems)
    return fixed
