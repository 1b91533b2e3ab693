"""Export a checkpoint's weights, from any layout, as safetensors, with the tokenizer.

    safetensors   our names: model = Mythos.from_pretrained("OUT")
    hf            AutoModelForCausalLM.from_pretrained("OUT", trust_remote_code=True)
    open_mythos   the names of OpenMythos' class: OpenMythos(config).load_state_dict(..., strict=False)

Needs no GPU; one tensor is in memory at a time.
"""

import argparse
import sys

from mythos_dist.config.arguments import add_write_options, nonempty_path, number, parse_arguments
from mythos_dist.errors import run_command


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=nonempty_path, help="a run.dir (its newest checkpoint) or the folder of one checkpoint")
    add("--out", type=nonempty_path, required=True, help="a new folder")
    add(
        "--format",
        choices=("safetensors", "hf", "open_mythos"),
        default="safetensors",
        help="for which class (%(default)s)",
    )
    add("--average", action="store_true", help="the average of the weights that the run keeps (average.kind)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="(%(default)s)")
    add("--file-size", type=number(1e-5, 1e4), default=5.0, metavar="GB", help="largest file (%(default)s)")
    add("--tokenizer", type=nonempty_path, help="its file (default: that of the training shards)")
    add_write_options(parser, workers=2)
    return parse_arguments(parser)


def main() -> None:
    """Export. Exit code 0, or 2 for a usage or input error."""
    arguments = parse()
    from mythos_dist.checkpoint.averaged import AverageOf
    from mythos_dist.checkpoint.export import export
    from mythos_dist.checkpoint.progress import bar
    from mythos_dist.checkpoint.restore import open_checkpoint
    from mythos_dist.config.load import config_from
    from mythos_dist.units import count

    source = open_checkpoint(arguments.checkpoint)
    samples = source.manifest.optimizer.get("average_samples", 0)
    if arguments.average:
        source = AverageOf(source)
    num_parameters = source.manifest.num_parameters
    with bar("exporting", 4 * num_parameters, arguments.quiet) as shown:
        files = export(
            source,
            arguments.out,
            arguments.format,
            dtype=arguments.dtype,
            tokenizer=arguments.tokenizer,
            file_bytes=int(arguments.file_size * 1e9),
            report=lambda note: print(f"note: {note}", file=sys.stderr),
            workers=arguments.workers,
            verify=not arguments.no_verify,
            progress=shown.update,
        )
    if not arguments.quiet:
        size = sum(file.stat().st_size for file in files)
        trained = config_from(source.manifest.config)
        mode = trained.act.mode_of(trained.model)
        if arguments.format == "open_mythos" and mode != "reference":
            print(
                f"note: OpenMythos' class uses halting, but these weights were trained with act.mode={mode}: its "
                "logits will differ"
            )
        average = f", average of {count(samples, 'sample')}" if arguments.average else ""
        about = f"step {source.manifest.step}{average}: {num_parameters:,} parameters"
        print(f"{about}, {size / 1e9:.3f} GB in {arguments.out}")


if __name__ == "__main__":
    run_command(main)
