"""Continue a text with a trained model: `python tools/generate.py RUN_DIR --prompt "..."`."""

import argparse
import sys
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import UserError, run_command


def main() -> None:
    """Parse the command line, load the run's newest checkpoint on one process and print the continued text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="a run.dir (its newest checkpoint) or the folder of one checkpoint")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads it from standard input")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--n-loops", type=int, help="loops of the recurrent block; default: as in training")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy decoding (%(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="0: sample from all tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file, if the training shards are not available")
    arguments = parse_arguments(parser)
    text = continue_text(arguments, read_prompt(arguments.prompt))
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # terminals without UTF-8
    print(text)


def read_prompt(prompt: str) -> str:
    """The text to continue. Raises UserError if there is none."""
    try:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        text.encode()  # an argument that is not UTF-8 has surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise UserError(f"the prompt is not valid UTF-8 ({error.reason})") from None
    if not text:
        raise UserError("the prompt is empty; give some text to continue")
    return text


def continue_text(arguments: argparse.Namespace, prompt: str) -> str:
    """The prompt and its continuation."""
    import torch

    from mythos_dist.checkpoint.restore import load_model
    from mythos_dist.data.manifest import read_shard_manifest
    from mythos_dist.data.tokenizer import Tokenizer
    from mythos_dist.model.generate import sampling_errors

    names = ("max_new_tokens", "n_loops", "temperature", "top_k")
    options = {name: getattr(arguments, name) for name in names}
    problems = [f"--{problem.replace('_', '-', 2)}" for problem in sampling_errors(**options)]
    if not 0 <= arguments.seed < 1 << 63:
        problems.append(f"--seed={arguments.seed} must be from 0 to 2^63 - 1")
    if problems:
        raise UserError(problems)
    model, config, step = load_model(arguments.run_dir)
    shards = Path(next(iter(config.data.folders)))  # all folders of a mix share one tokenizer
    if arguments.tokenizer:
        tokenizer = Tokenizer.load(arguments.tokenizer)
    else:
        try:
            manifest = read_shard_manifest(shards)
        except UserError as error:
            raise UserError(f"no tokenizer ({error}); name its file with --tokenizer", str(arguments.run_dir)) from None
        tokenizer = Tokenizer.load(config.data.tokenizer or shards / manifest.tokenizer, manifest.eos)
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))
    if not len(ids):
        raise UserError(f"the prompt {prompt!r} has no tokens in {tokenizer.path}; give some text to continue")
    if options["n_loops"] is None:
        options["n_loops"] = config.loops.mean_of(config.model)
    generator = torch.Generator().manual_seed(arguments.seed)
    tokens = model.generate(ids.unsqueeze(0), stop_token=tokenizer.eos_id, generator=generator, **options)
    return f"[after {step} steps] " + tokenizer.decode(tokens[0].tolist())


if __name__ == "__main__":
    run_command(main)
