"""Bring a model back from Hugging Face's transformers: an export with our names, from which a run can begin.

mythos import hf FOLDER --out DIR
torchrun … -m mythos_dist.train configs/1b.yaml start_from=DIR run.dir=runs/second

FOLDER is what mythos export --format hf wrote, or what `model.save_pretrained(FOLDER)` wrote after
fine-tuning; merge adapters first, with `model.merge_and_unload()`. No code in it is run.
"""

import argparse

from mythos_dist.config.arguments import (
    add_export_options,
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
    add("folder", type=location, help="a model's folder, or its URL")
    add_export_options(parser)
    add("--tokenizer", type=nonempty_path, help="tokenizer file (default: that of FOLDER)")
    add_write_options(parser, workers=2)
    return parser


def main() -> None:
    """Import. Exit code 0, or 2 for a usage or input error."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.checkpoint.export import export
    from mythos_dist.checkpoint.exported import open_model_folder
    from mythos_dist.progress import Bar

    notes: list[str] = []
    source = open_model_folder(arguments.folder)
    with Bar("importing", source.manifest.weight_bytes, quiet=arguments.quiet) as shown:
        files = export(
            source,
            arguments.out,
            "safetensors",
            dtype=arguments.dtype,
            tokenizer=arguments.tokenizer,
            workers=arguments.workers,
            verify=not arguments.no_verify,
            progress=shown.update,
            report=notes.append,
        )
    parameters = source.manifest.num_parameters
    text = f"{parameters:,} parameters -> {arguments.out}; train with start_from={arguments.out}"
    values = {"parameters": parameters, "bytes": sum(file.stat().st_size for file in files)}
    print_result(arguments, text, notes, folder=arguments.folder, out=arguments.out, **values)


if __name__ == "__main__":
    run_command(main)
