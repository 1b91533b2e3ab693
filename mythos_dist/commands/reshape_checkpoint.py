"""Rewrite a checkpoint as full (unsharded) tensors in few large files, as the first checkpoint of a new run.

Changing the layout does not need this: any layout loads any checkpoint. It is for archiving a checkpoint, moving it to
another cluster, or starting thousands of ranks from few files. Needs no GPU; memory does not grow with the model.

If MYTHOS_CHECKPOINT_KEY_FILE names a key, CHECKPOINT must be signed with it, and the copy is signed, too.
"""

import argparse
import os

from mythos_dist.config.arguments import (
    CHECKPOINT_HELP,
    add_write_options,
    location,
    nonempty_path,
    parse_arguments,
    print_result,
)
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=location, help=CHECKPOINT_HELP)
    add("--out", type=nonempty_path, required=True, help="run.dir of the new run")
    add(
        "--ignore-signature",
        action="store_true",
        help="accept an unsigned CHECKPOINT, or one signed with another key",
    )
    add_write_options(parser, workers=len(os.sched_getaffinity(0)))
    return parser


def main() -> None:
    """Rewrite. Exit code 0, or 2 for a usage or input error."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.checkpoint.canonical import write_canonical
    from mythos_dist.checkpoint.restore import open_checkpoint
    from mythos_dist.progress import Bar

    source = open_checkpoint(arguments.checkpoint, check_signature=not arguments.ignore_signature)
    size = source.manifest.bytes
    with Bar("writing", source.manifest.tensor_bytes(), quiet=arguments.quiet) as shown:
        folder = write_canonical(
            source,
            arguments.out,
            workers=arguments.workers,
            verify=not arguments.no_verify,
            progress=shown.update,
        )
    text = f"{source.folder} -> {folder}, {size / 1e9:.3f} GB; train with run.dir={arguments.out} to resume from it"
    values = {"step": source.manifest.step, "parameters": source.manifest.num_parameters, "bytes": size}
    print_result(arguments, text, (), checkpoint=source.folder, out=folder, **values)


if __name__ == "__main__":
    run_command(main)
