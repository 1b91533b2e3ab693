"""Continue a text with a trained model: `python tools/generate.py RUN_DIR --prompt "..."`."""

import argparse
from pathlib import Path

from mythos_dist.config.arguments import parse_arguments
from mythos_dist.errors import UserError, exit_with, run_command


def main() -> None:
    """Parse the command line, load the run's newest checkpoint on one process and print the continued text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the folder of a run (run.dir) that has a checkpoint")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--n-loops", type=int, help="loops of the recurrent block; default: as in training")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="0 samples from all tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    arguments = parse_arguments(parser)
    try:
        print(continue_text(arguments))
    except UserError as error:
        exit_with(error)


def continue_text(arguments: argparse.Namespace) -> str:
    """The prompt and its continuation."""
    import torch

    from mythos_dist.checkpoint.restore import load_model
    from mythos_dist.data.manifest import read_manifest
    from mythos_dist.data.tokenizer import Tokenizer

    model, config, step = load_model(arguments.run_dir)
    shards = Path(next(iter(config.data.folders)))  # all folders of a mix have the same tokenizer
    manifest = read_manifest(shards)
    tokenizer = Tokenizer.load(config.data.tokenizer or shards / manifest.tokenizer, manifest.eos)
    prompt = torch.from_numpy(tokenizer.encode(arguments.prompt).astype("int64")).unsqueeze(0)
    tokens = model.generate(
        prompt,
        arguments.max_new_tokens,
        n_loops=arguments.n_loops or config.loops.mean_of(config.model),
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        stop_token=tokenizer.eos_id,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    return f"[after {step} steps] " + tokenizer.decode(tokens[0].tolist())


if __name__ == "__main__":
    run_command(main)
