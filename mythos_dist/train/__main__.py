"""`python -m mythos_dist.train CONFIG.yaml [section.key=value ...]`, alone or once per rank under a launcher."""

import argparse
import gc
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mythos_dist.errors import NodeError, UserError, exit_with, report_to_launcher, run_command
from mythos_dist.units import count

if TYPE_CHECKING:  # what takes longer to import comes when Ctrl-C is handled
    from mythos_dist.config.schema import Config
    from mythos_dist.parallel.launcher import RankInfo

EPILOG = """\
under a launcher:
  torchrun --nproc_per_node N -m mythos_dist.train CONFIG.yaml ...
  srun python -m mythos_dist.train CONFIG.yaml ...     (launch/slurm.sbatch does more)
  launch/deepspeed.sh HOSTFILE CONFIG.yaml ...

exit codes:
  0   done; run.dir/COMPLETED says so
  2   something has to be mended: the message says what
  3   a node is unfit: start again without it
  4   a rank hung or vanished: start again
  5   gradients stay useless: the message says where to look
  85  stopped early behind a checkpoint (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, run.max_seconds, a file run.dir/STOP): start
      again
  130 stopped by Ctrl-C before the first step, or at once by a second Ctrl-C
"""


def main() -> None:
    """Train; see EPILOG for the exit codes."""
    from mythos_dist.train.stop import Stop

    stop = Stop()
    stop.listen(signal.SIGUSR1, signal.SIGINT)
    arguments = parse()
    from mythos_dist.parallel.launcher import RankInfo, read_rank_info
    from mythos_dist.train.console import keep_console

    keep_console()
    rank_info, watchdog, code = RankInfo(), None, 0
    try:
        rank_info = read_rank_info()
        # What can be checked without torch is checked before it is imported: an error takes a second, not ten.
        config = read(arguments.config, arguments.overrides, rank_info)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its sockets warn of every attempt; we say it once
        # Imports leave little garbage and 400,000 objects: full collections among them were an eighth of a start's CPU.
        gc.disable()
        from mythos_dist.parallel.process import keep_freed_memory
        from mythos_dist.train.loop import train
        from mythos_dist.train.session import join

        gc.freeze()
        gc.enable()
        session = join(config, rank_info, stop)
        watchdog = session.watchdog
        keep_freed_memory()
        code = train(config, session, only_preflight=arguments.preflight)
        session.close()
    except UserError as error:
        if watchdog:
            watchdog.leave()
        leave(error, rank_info)
    except Exception as error:
        logging.getLogger(__name__).exception("%s failed", rank_info)
        if watchdog:
            watchdog.fail(error)
        raise
    if code:
        if rank_info.rank == 0:
            report_to_launcher(code)
        # At once: a launcher ends all others when the first one leaves with another code than 0.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    import torch.distributed as dist

    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    """The command line: options and settings in any order."""
    from mythos_dist.config.arguments import add_config, parse_arguments

    parser = argparse.ArgumentParser(
        prog="python -m mythos_dist.train",
        description="Train a Recurrent-Depth Transformer. Running it again with the same run.dir resumes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser, "a YAML file, such as configs/demo.yaml")
    parser.add_argument("--preflight", action="store_true", help="only check all nodes and the links between them")
    return parse_arguments(parser)


def read(path: str, overrides: list[str], rank_info: "RankInfo") -> "Config":
    """The config, fit for so many ranks. Raises UserError."""
    from mythos_dist.config.layout import layout_problems
    from mythos_dist.config.load import load_config
    from mythos_dist.ops.cluster.inject import parse_faults

    try:
        config = load_config(path, overrides)
        parse_faults(config.faults.inject)
        if problems := layout_problems(config, rank_info.world_size):
            raise UserError(problems, source=f"{path} on {count(rank_info.world_size, 'rank')}")
        return config
    except UserError as error:
        error.only_this_rank = not Path(path).is_file()  # perhaps only here; all else rank 0 finds as well
        raise


def leave(error: UserError, rank_info: "RankInfo") -> None:
    """One rank says what is wrong; all leave with the same code."""
    if rank_info.rank == 0 or error.only_this_rank:
        report_to_launcher(error.exit_code, error.nodes if isinstance(error, NodeError) else ())
    if rank_info.rank and error.only_this_rank and rank_info.local_rank == 0:
        print(f"{rank_info}: ", end="", file=sys.stderr)
    if rank_info.rank == 0 or (error.only_this_rank and rank_info.local_rank == 0):
        exit_with(error)
    time.sleep(1)  # a launcher may kill all others as soon as one has left, and rank 0 is to speak
    sys.exit(error.exit_code)


if __name__ == "__main__":
    run_command(main, is_tool=False)
