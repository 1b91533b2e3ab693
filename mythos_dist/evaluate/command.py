"""`mythos evaluate`: scores of a checkpoint or an export on tasks, on any number of ranks."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from mythos_dist.checkpoint.exported import is_export
from mythos_dist.checkpoint.names import step_of
from mythos_dist.checkpoint.restore import config_of, load_model, open_weights_at
from mythos_dist.data.tokenizer_files import evaluation_tokenizer
from mythos_dist.errors import UserError
from mythos_dist.evaluate.cache import Cache, lock, weights_id
from mythos_dist.evaluate.replicas import Replicas
from mythos_dist.evaluate.report import Results, draw, score_table, to_json
from mythos_dist.evaluate.scorer import Scorer, evaluate_on_all_ranks
from mythos_dist.evaluate.task_set import load_task_set, task_names
from mythos_dist.parallel.launcher import export_rank_info, read_rank_info
from mythos_dist.parallel.process import DTYPES, device, join_process_group, on_rank_0, raise_on_all_ranks
from mythos_dist.progress import Bar
from mythos_dist.train.sweep import parse_loops, write_json
from mythos_dist.urls import AnyPath

TIMEOUT = 86400.0  # seconds that other ranks wait for rank 0, which may download data


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, then write and print the results. Raises UserError."""
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if names == ["list"]:
        print("\n".join(task_names()))
        return
    loops, problems = parse_loops(arguments.loops) if arguments.loops else ([], [])
    if arguments.path is None:
        problems.append("name a run, a checkpoint or an export")
    if not names:
        problems.append("--tasks is empty; name tasks, or `list` to print their names")
    if problems:
        raise UserError(problems)
    rank_info = read_rank_info()
    export_rank_info(rank_info)
    join_process_group(seconds=TIMEOUT)
    try:
        _run(arguments, names, loops)
    except UserError as error:
        if rank_info.rank == 0:
            raise
        time.sleep(1)  # rank 0 prints it first: a launcher may kill all others as soon as one rank has exited
        sys.exit(error.exit_code)
    dist.destroy_process_group()


def _run(arguments: argparse.Namespace, names: Sequence[str], loops: list[int]) -> None:
    checkpoint = raise_on_all_ranks(lambda: open_weights_at(arguments.path))
    folder = checkpoint.folder
    out = arguments.out or raise_on_all_ranks(lambda: default_out(folder))
    claimed = on_rank_0(lambda: lock(out.parent))
    # Tasks come before the weights, which may take minutes to load.
    config = raise_on_all_ranks(lambda: config_of(checkpoint))
    evaluation = on_rank_0(lambda: load_task_set(names, config, arguments.samples, arguments.data))
    tokenizer = raise_on_all_ranks(lambda: evaluation_tokenizer(config, folder, arguments.tokenizer))
    model, _, step = raise_on_all_ranks(lambda: load_model(folder, quiet=dist.get_rank() > 0))
    model.to(device())
    for parameter in model.parameters():  # not buffers: the router's bias stays in fp32, as in training
        parameter.data = parameter.data.to(DTYPES[arguments.dtype])
    trained = config.loops.mean_of(config.model)

    def evaluate(scorer: Scorer) -> tuple[Results, int]:
        assert evaluation, "it is loaded on rank 0"
        results = {n: evaluation.run(scorer, tokenizer, n, arguments.limit) for n in sorted(set(loops or [trained]))}
        return results, scorer.computed

    cache = Cache(out.parent / "cache" / weights_id(checkpoint, arguments.dtype)) if claimed else Cache()
    backend = Replicas(model, tokenizer, arguments.batch_tokens)
    with Bar("evaluating", unit=" requests", quiet=dist.get_rank() > 0) as shown:
        evaluated = evaluate_on_all_ranks(backend, cache, evaluate, shown.show)
    if evaluated is None:
        return
    results, computed = evaluated
    content = {"checkpoint": str(folder), "step": step, "trained_loops": trained, "dtype": arguments.dtype}
    content |= {"computed_requests": computed, "tasks": to_json(results)}
    write_json(Path(f"{out}.json"), content)
    draw(Path(f"{out}.png"), results, trained)
    if arguments.json:
        print(json.dumps(content))
    else:
        print(f"{score_table(results)}\n{out}.json, {out}.png")


def default_out(folder: AnyPath) -> Path:
    """RUN/evaluate/STEP for a run's checkpoint, EXPORT/evaluate/export for an export: a run removes only folders of
    checkpoints that hold nothing else. Raises UserError for one in a store."""
    if not isinstance(folder, Path):
        raise UserError("is in a store, and results are written to a local folder; name one with --out", str(folder))
    if is_export(folder):
        return folder / "evaluate" / "export"
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    return run_dir / "evaluate" / (folder.name if step_of(folder.name) is not None else f"{folder.name}-checkpoint")
