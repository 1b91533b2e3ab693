"""`python -m mythos_dist.train CONFIG.yaml [section.key=value ...]`, alone or once per rank under a launcher."""

import argparse
import logging
import os
import sys

from mythos_dist.config.layout import layout_problems
from mythos_dist.config.load import load_config
from mythos_dist.errors import EXIT_USER_ERROR, UserError, exit_with


def main() -> None:
    """Train; exit code 0 when done, 2 for what the user has to mend, another for a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m mythos_dist.train",
        description="Train a Recurrent-Depth Transformer. Running it again with the same run.dir resumes.",
        epilog="Under a launcher: torchrun --nproc_per_node N -m mythos_dist.train CONFIG.yaml ...",
    )
    parser.add_argument("config", help="a YAML file, such as configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    arguments = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        # What can be checked without torch is checked before it is imported: an error takes a second, not ten.
        config = load_config(arguments.config, arguments.overrides)
        if problems := layout_problems(config, world):
            raise UserError(problems, source=arguments.config)
        from mythos_dist.parallel.process import join_process_group, keep_freed_memory
        from mythos_dist.train.loop import train

        join_process_group()
        keep_freed_memory()
        train(config)
    except UserError as error:
        if rank == 0:
            exit_with(error)
        sys.exit(EXIT_USER_ERROR)
    except Exception:
        logging.getLogger(__name__).exception("rank %d failed", rank)
        raise
    import torch.distributed as dist

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
