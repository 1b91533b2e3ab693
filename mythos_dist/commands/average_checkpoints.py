"""Average the weights of several checkpoints or exports of one model, and write the mean as an export.

    mythos average RUN/checkpoints/step-00000800 RUN/checkpoints/step-00000900 RUN --out weights

The mean is computed in float64 and rounded once. Other programs read the result (mythos export), and a run
begins with it by `start_from=weights`. Needs no GPU; memory does not grow with the model.
"""

import argparse

from mythos_dist.config.arguments import add_export_options, add_write_options, location, parse_arguments, print_result
from mythos_dist.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        type=location,
        metavar="CHECKPOINT",
        help="the folder of a checkpoint, a run.dir (its newest checkpoint), the folder of an export, or a URL",
    )
    add_export_options(parser)
    add(
        "--weights",
        nargs="+",
        metavar="W",
        help="a weight above 0 for each CHECKPOINT, such as 1 2 1; their sum does not matter (default: all equal)",
    )
    add_write_options(parser, workers=2)
    return parser


def main() -> None:
    """Average. Exit code 0, or 2 for a usage or input error."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.checkpoint.averaged import open_mean
    from mythos_dist.checkpoint.export import export
    from mythos_dist.progress import Bar

    mean = open_mean(arguments.checkpoints, arguments.out, arguments.weights)
    notes = list(mean.notes())
    with Bar("averaging", mean.manifest.weight_bytes, quiet=arguments.quiet) as shown:
        files = export(
            mean,
            arguments.out,
            "safetensors",
            dtype=arguments.dtype,
            workers=arguments.workers,
            verify=not arguments.no_verify,
            progress=shown.update,
            report=notes.append,
        )
    size = sum(file.stat().st_size for file in files)
    text = f"{mean.describe()}, {size / 1e9:.3f} GB in {arguments.out}"
    values = {"step": mean.manifest.step, "parameters": mean.manifest.num_parameters, "bytes": size}
    print_result(arguments, text, notes, checkpoints=[*map(str, arguments.checkpoints)], out=arguments.out, **values)


if __name__ == "__main__":
    run_command(main)
