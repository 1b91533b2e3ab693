"""`mythos decoding-quality`: the held-out loss of a checkpoint over modes of the KV cache and exits; its drafts."""

import argparse
import json
import re

from mythos_dist.checkpoint.restore import load_model
from mythos_dist.errors import UserError
from mythos_dist.evaluate.decoding import Drafts, Speculated, Variant, decode_sequences, speculate_sequences
from mythos_dist.files import make_folders, write_atomically
from mythos_dist.generate.sampling import Sampling, request_errors
from mythos_dist.generate.speculate import speculation_errors
from mythos_dist.model.kv_cache import loops_per_entry
from mythos_dist.progress import Bar
from mythos_dist.train.sweep import open_sequences, read_sequences


def run(arguments: argparse.Namespace) -> None:
    """Measure all variants and print them. Raises UserError."""
    variants, drafts = parse_variants(arguments.cache, arguments.exits), parse_drafts(arguments.drafts)
    model, config, step = load_model(arguments.checkpoint, quiet=False)
    n_loops = arguments.loops or config.loops.mean_of(config.model)
    exits = dict.fromkeys((one.exit, one.threshold) for one in variants)
    samplings = [Sampling(max_new_tokens=1, exit=exit, exit_threshold=threshold) for exit, threshold in exits]
    mode = model.recurrent.act.mode
    errors = [error for one in samplings for error in request_errors(model.config, mode, None, [0], one)]
    for one in drafts:
        errors += speculation_errors(Sampling(temperature=0), n_loops, one.loops, one.tokens)
    if errors:
        raise UserError(errors)
    if arguments.out:
        make_folders(arguments.out.parent)  # fail before decoding, not after
    stream, folder = open_sequences(config, arguments.data, arguments.samples)
    (held_out,) = read_sequences(stream, min(arguments.samples, stream.num_samples), arguments.samples)
    inputs, labels = (field[:, : arguments.tokens] for field in (held_out.input_ids, held_out.final_labels))
    results, drafted = {}, {}
    generated = len(inputs) * (inputs.shape[1] - inputs.shape[1] // 2)
    total = len(variants) * inputs.numel() + len(drafts) * generated
    with Bar("decoding", total, unit=" tokens") as shown:
        for variant in variants:
            results[variant] = decode_sequences(model, inputs, labels, n_loops, variant, shown.update)
        for one in drafts:
            drafted[one] = speculate_sequences(model, inputs, n_loops, one, shown.update)
    print(f"step {step}, {n_loops} loops, {inputs.numel():,} tokens of {folder}")
    width = max(len(variant.name) for variant in variants)
    print(f"{'':{width}s}     loss  accuracy  loops per token  cache bytes per token")
    for variant, one in results.items():
        print(
            f"{variant.name:{width}s}  {one.loss:7.4f}  {one.accuracy:8.2%}  {one.loops:15.2f}  {one.cache_bytes:21,d}"
        )
    if drafted:
        _print_drafts(drafted, generated, n_loops)
    if arguments.out:
        rows = [{**variant._asdict(), **one._asdict()} for variant, one in results.items()]
        content = {"checkpoint": str(arguments.checkpoint), "step": step, "loops": n_loops, "results": rows}
        content["drafts"] = [
            {"draft_loops": one.loops, "draft_tokens": one.tokens, **result._asdict()}
            for one, result in drafted.items()
        ]
        write_atomically(arguments.out, json.dumps(content, indent=2) + "\n")


def _print_drafts(drafted: dict[Drafts, Speculated], tokens: int, n_loops: int) -> None:
    print(f"\ngreedy continuations of {tokens:,} tokens with drafts; {n_loops} loops per token without")
    width = max(len(one.name) for one in drafted)
    print(f"{'':{width}s}  drafts accepted  loops per token")
    for one, result in drafted.items():
        print(f"{one.name:{width}s}  {result.acceptance:15.1%}  {result.loops:15.2f}")


def parse_drafts(text: str) -> list[Drafts]:
    """The drafts of `1:4,2:4`, LOOPS:TOKENS. Raises UserError with all problems."""
    drafts, problems = [], []
    for one in filter(None, (one.strip() for one in text.split(","))):
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", one)
        if match:
            drafts.append(Drafts(int(match[1]), int(match[2])))
        else:
            problems.append(f"--drafts names {one!r}; give LOOPS:TOKENS, such as 2:4")
    if problems:
        raise UserError(problems)
    return list(dict.fromkeys(drafts))


def parse_variants(caches: str, exits: str) -> list[Variant]:
    """Every cache of `all,last` without exits, and with each of `latent:0.03,kl:5e-4`. Raises UserError with all
    problems."""
    modes = [one.strip() for one in caches.split(",")]
    problems: list[str] = []
    for mode in modes:
        try:
            loops_per_entry(mode)
        except UserError as error:
            problems += error.problems
    variants = [Variant(mode) for mode in modes]
    for text in filter(None, (one.strip() for one in exits.split(","))):
        criterion, _, threshold = text.partition(":")
        try:
            variants += [Variant(mode, criterion, float(threshold)) for mode in modes]
        except ValueError:
            problems.append(f"--exits names {text!r}; give CRITERION:THRESHOLD, such as latent:0.03")
    if problems:
        raise UserError(problems)
    return sorted(variants, key=lambda one: modes.index(one.cache))
