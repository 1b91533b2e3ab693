"""`mythos train CONFIG.yaml [section.key=value ...]`, alone or once per rank under a launcher."""

import argparse
import gc
import importlib
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from mythos_dist.errors import NodeError, UserError, exit_with, report_to_launcher, run_command
from mythos_dist.units import count

if TYPE_CHECKING:  # slow imports are inside functions: they come after Ctrl-C is handled
    from mythos_dist.config.schema import Config
    from mythos_dist.parallel.launcher import RankInfo
    from mythos_dist.train.session import Session

EPILOG = """\
under a launcher:
  torchrun --nproc_per_node N -m mythos_dist.train CONFIG.yaml ...
  srun mythos train CONFIG.yaml ...     (launch/slurm.sbatch does more)
  launch/deepspeed.sh HOSTFILE CONFIG.yaml ...

exit codes:
  0   done: run.dir/COMPLETED exists
  2   configuration or input error, named in the message
  3   unfit node: start again without it
  4   a rank hung or was lost: start again
  5   diverged: gradients are still not finite or too large after all rollbacks
  85  stopped early after a checkpoint (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, run.max_seconds, a file run.dir/STOP): start
      again
  130 stopped by Ctrl-C before the first step, or at once by a second Ctrl-C
"""


def main() -> None:
    """Train; see EPILOG for the exit codes."""
    from mythos_dist.train.stop import StopHandler

    stop = StopHandler()
    stop.handle(signal.SIGUSR1, signal.SIGINT)
    from mythos_dist.config.arguments import parse_arguments

    arguments = parse_arguments(build_parser())
    from mythos_dist.parallel.launcher import RankInfo, read_rank_info
    from mythos_dist.train.console import keep_console

    keep_console()
    rank_info, session, code = RankInfo(), None, 0
    try:
        rank_info = read_rank_info()
        # Before torch is imported, so that an error takes a second and not ten.
        stages = read(arguments.config, arguments.overrides, rank_info)
        if rank_info.rank == 0 and sys.stderr.isatty():  # nothing else is printed for seconds
            print("starting: imports, then checks of the machine, the shards and checkpoints", file=sys.stderr)
        _import_training()
        from mythos_dist.ops.session import join_ranks
        from mythos_dist.parallel.process import keep_freed_memory

        session = join_ranks(stages, rank_info, stop)
        keep_freed_memory()
        code = run(stages, session, arguments.preflight)
        session.close()
    except UserError as error:
        if session:
            session.leave()
        exit_with_message(error, rank_info)
    except Exception as error:
        logging.getLogger(__name__).exception("%s failed", rank_info)
        if session:
            session.fail(error)
        raise
    if code:
        if rank_info.rank == 0:
            report_to_launcher(code)
        sys.exit(code)
    import torch.distributed as dist

    dist.destroy_process_group()


def _import_training() -> None:
    """Import all that a run needs."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library reports each begin, and missing GPUs
    # Imports leave little garbage and 400,000 objects: full collections among them were an eighth of a start's CPU.
    gc.disable()
    importlib.import_module("mythos_dist.ops.hooks")
    importlib.import_module("mythos_dist.ops.session")
    importlib.import_module("mythos_dist.train.loop")
    gc.freeze()
    gc.enable()


def run(stages: "list[Config]", session: "Session", only_preflight: bool) -> int:
    """Check the inputs and the nodes, then train stage by stage, beginning with the one that the run is in.

    Returns the exit code; raises UserError.
    """
    from mythos_dist.ops.hooks import Operations
    from mythos_dist.train.loop import train
    from mythos_dist.train.prepare import check_run, check_stage
    from mythos_dist.train.resume import find_newest, find_stage

    session.enter_phase("checking")
    operations = [Operations(stage, session) for stage in stages]
    # Every start needs the last stage. It is checked first, because the search reads all bytes of a checkpoint.
    corpora = {len(stages) - 1: check_stage(stages[-1], session, operations[-1])}
    newest = find_newest(stages[0])
    current = find_stage(stages, newest)
    for index in range(current, len(stages) - 1):
        corpora[index] = check_stage(stages[index], session, operations[index])
    for index in range(current, len(stages)):
        inputs = check_run(stages[index], session, corpora[index], newest if index == current else None)
        if index == current:
            operations[index].preflight(only_preflight)
        if only_preflight:
            return 0
        if code := train(stages[index], session, inputs, operations[index], is_last_stage=index == len(stages) - 1):
            return code
        session.begin_stage()
        # The engine of the stage is part of cycles, and holds its memory until they are found. Twice, because the
        # finalizer of DeepSpeed's engine makes what the first collection finds reachable again.
        gc.collect()
        gc.collect()
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line: options and settings in any order."""
    from mythos_dist.config.arguments import add_config

    parser = argparse.ArgumentParser(
        prog="mythos train",
        description="Train a Recurrent-Depth Transformer. Running it again with the same run.dir resumes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser, "a YAML file, such as configs/demo.yaml")
    parser.add_argument(
        "--preflight", action="store_true", help="check the nodes and the links between them, then exit"
    )
    return parser


def read(path: str, overrides: list[str], rank_info: "RankInfo") -> "list[Config]":
    """Read the config of each stage and check it against the number of ranks. Raises UserError."""
    from mythos_dist.config.layout import layout_problems
    from mythos_dist.config.load import find_config, load_stages
    from mythos_dist.config.unread import unread_settings
    from mythos_dist.ops.cluster.inject import parse_faults

    try:
        stages = load_stages(path, overrides)
        for config in stages:
            parse_faults(config.faults.inject)
            if problems := layout_problems(config, rank_info.world_size):
                raise UserError(problems, source=f"{path} on {count(rank_info.world_size, 'rank')}")
        for note in unread_settings(stages) if rank_info.rank == 0 else ():
            print(f"note: {path}: {note}", file=sys.stderr)
        return stages
    except UserError as error:
        error.only_this_rank = not find_config(path).is_file()  # rank 0 has all other errors as well
        raise


def exit_with_message(error: UserError, rank_info: "RankInfo") -> None:
    """Print the error on one rank; all ranks exit with the same code."""
    if rank_info.rank == 0 or error.only_this_rank:
        report_to_launcher(error.exit_code, error.nodes if isinstance(error, NodeError) else ())
    if rank_info.rank and error.only_this_rank and rank_info.local_rank == 0:
        print(f"{rank_info}: ", end="", file=sys.stderr)
    if rank_info.rank == 0 or (error.only_this_rank and rank_info.local_rank == 0):
        exit_with(error)
    time.sleep(1)  # rank 0 prints first: a launcher may kill all others as soon as one rank has exited
    sys.exit(error.exit_code)


if __name__ == "__main__":
    run_command(main, is_tool=False)
