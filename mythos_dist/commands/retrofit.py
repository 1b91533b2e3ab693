"""Make a looped model of a pretrained one of transformers, from which a run can begin.

mythos retrofit llama --out looped --prelude 4 --loop 4..11 --coda 4
mythos train looped/train.yaml start_from=looped data.path=SHARDS run.dir=runs/looped

The first layers are the prelude, consecutive ones the looped block, the last ones the coda. With one loop the result
computes what the original does. FOLDER has config.json and safetensors of Llama, Mistral, Qwen2, Qwen3, Mixtral or
Qwen3-MoE. No code in it is run.
"""

import argparse

from mythos_dist.config.arguments import (
    add_export_options,
    add_print_options,
    integer,
    nonempty_path,
    number,
    parse_arguments,
    print_result,
)
from mythos_dist.errors import run_command

_LAYERS, _NUMBER = integer(0, 10**6), integer(1, 10**6)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=nonempty_path, help="a model's folder, as save_pretrained writes it")
    add_export_options(parser)
    add("--prelude", type=_LAYERS, required=True, metavar="A", help="number of first layers before the loops")
    add("--loop", type=_span, required=True, metavar="B..C", help="looped layers, counted from 0, C included")
    add("--coda", type=_LAYERS, required=True, metavar="D", help="number of last layers after the loops")
    add("--loops", type=integer(1, 512), default=4, metavar="N", help="mean loops of training and use (%(default)s)")
    add("--injection", choices=("difference", "none"), default="difference", help="model.injection (%(default)s)")
    add("--experts", type=_NUMBER, default=1, metavar="E", help="experts per looped FFN, copies of it (%(default)s)")
    add("--experts-per-token", type=_NUMBER, default=1, metavar="K", help="experts that each token gets (%(default)s)")
    add("--slices", action="store_true", help="each expert has 1/E of the FFN's hidden channels instead of a copy")
    noise = "standard deviation of noise added to the experts, as a share of each matrix's own (%(default)s)"
    add("--noise", type=number(0, 10), default=0.0, metavar="S", help=noise)
    add("--tokenizer", type=nonempty_path, help="tokenizer file (default: that of FOLDER)")
    add_print_options(parser)
    return parser


def _span(text: str) -> tuple[int, int]:
    first, dots, last = text.partition("..")
    if not dots:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST..LAST, such as 4..11")
    return _LAYERS(first), _LAYERS(last)


def main() -> None:
    """Retrofit. Exit code 0, or 2 for a usage or input error."""
    arguments = parse_arguments(build_parser())
    from mythos_dist.checkpoint.retrofit import CONFIG_FILE, Cut, PretrainedWeights, Upcycling, retrofit
    from mythos_dist.progress import Bar

    notes: list[str] = []
    first, last = arguments.loop
    source = PretrainedWeights(
        arguments.folder.expanduser(),
        Cut(arguments.prelude, first, last, arguments.coda),
        loops=arguments.loops,
        injection=arguments.injection,
        upcycling=Upcycling(arguments.experts, arguments.experts_per_token, arguments.noise, arguments.slices),
    )
    with Bar("retrofitting", source.manifest.weight_bytes, quiet=arguments.quiet) as shown:
        options = dict(dtype=arguments.dtype, tokenizer=arguments.tokenizer, progress=shown.update)
        files = retrofit(source, arguments.out, report=notes.append, **options)
    parameters, out = source.manifest.num_parameters, arguments.out
    text = f"{parameters:,} parameters -> {out}; train with mythos train {out / CONFIG_FILE} start_from={out}"
    values = {"parameters": parameters, "bytes": sum(file.stat().st_size for file in files)}
    print_result(arguments, text, notes, folder=arguments.folder, out=out, **values)


if __name__ == "__main__":
    run_command(main)
