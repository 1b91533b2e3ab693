"""Rewrite a checkpoint as whole tensors in few large files, in the folder of a new run, which goes on from there.

Not needed to change the layout: any run reads any checkpoint. For keeping a checkpoint, carrying it to another cluster,
or starting thousands of ranks from few files. Needs no GPU, and no more memory for a larger model.

If MYTHOS_CHECKPOINT_KEY_FILE names a key, CHECKPOINT must be signed with it, and the copy is.
"""

import argparse
import os

from mythos_dist.checkpoint.arguments import count, path
from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import run_command


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=path, help="a run.dir (its newest checkpoint) or the folder of one checkpoint")
    add("--out", type=path, required=True, help="run.dir of the new run")
    add("--workers", type=count, default=len(os.sched_getaffinity(0)), help="files written at a time (%(default)s)")
    add("--no-verify", action="store_true", help="do not look for damage first (ignored with a signing key)")
    add("--ignore-signature", action="store_true", help="accept an unsigned CHECKPOINT, or one of another key")
    add("--quiet", action="store_true", help="say nothing but errors")
    return parse_arguments(parser)


def main() -> None:
    """Rewrite; the exit code is 0, or 2 for a mistake in what was given."""
    arguments = parse()
    from mythos_dist.checkpoint.canonical import write_canonical
    from mythos_dist.checkpoint.progress import bar
    from mythos_dist.checkpoint.restore import open_checkpoint

    source = open_checkpoint(arguments.checkpoint, check_signature=not arguments.ignore_signature)
    size = source.manifest.bytes
    with bar("writing", size, arguments.quiet) as shown:
        folder = write_canonical(
            source,
            arguments.out,
            workers=arguments.workers,
            verify=not arguments.no_verify,
            progress=shown.update,
        )
    if not arguments.quiet:
        print(f"{source.folder} is now {folder}, {size / 1e9:.3f} GB; train with run.dir={arguments.out} to go on")


if __name__ == "__main__":
    run_command(main)
