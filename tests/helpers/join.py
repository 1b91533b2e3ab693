"""A program for launcher tests: ranks join as in a training run, run one all-reduce and exit.

`python -m helpers.join CONFIG.yaml [section.key=value ...]` prints "joined 2 of 5" on each rank. If the environment
has FAIL_FIRST, the last rank of the first attempt kills itself after all ranks have joined.
"""

import os
import signal
import sys


def main() -> None:
    from mythos_dist.config.load import load_config
    from mythos_dist.parallel.launcher import read_rank_info
    from mythos_dist.train.stop import StopHandler

    config = load_config(sys.argv[1], sys.argv[2:])
    rank_info = read_rank_info()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    import torch.distributed as dist

    from mythos_dist.ops.session import join_ranks

    session = join_ranks([config], rank_info, StopHandler())
    fail = os.environ.get("FAIL_FIRST") and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if fail and rank_info.rank == rank_info.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks = torch.ones(1)
    dist.all_reduce(ranks)
    assert int(ranks) == len(session.nodes) == rank_info.world_size
    session.close()
    sys.stdout.write(f"joined {rank_info.rank} of {rank_info.world_size}\n")  # one write: ranks share the pipe
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
