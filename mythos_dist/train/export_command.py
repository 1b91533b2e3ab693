"""`mythos export`: options, notes and the line at the end."""

import argparse
import re

from mythos_dist.checkpoint.averaged import AverageOf
from mythos_dist.checkpoint.export import export
from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.checkpoint.restore import config_of, open_checkpoint
from mythos_dist.checkpoint.universal import export_universal
from mythos_dist.config.arguments import print_result
from mythos_dist.config.load import config_from
from mythos_dist.errors import UserError
from mythos_dist.progress import Bar
from mythos_dist.train.schedule import learning_rate
from mythos_dist.train.start_from import steps_done
from mythos_dist.units import count

UNIVERSAL = "deepspeed-universal"


def run(arguments: argparse.Namespace) -> None:
    """Export. Raises UserError."""
    _check(arguments)
    source = open_checkpoint(arguments.checkpoint)
    snapshots = source.manifest.optimizer.get("average_samples", 0)
    if arguments.average:
        source = AverageOf(source)
    manifest, notes = source.manifest, []
    common = {
        "tokenizer": arguments.tokenizer,
        "workers": arguments.workers,
        "verify": not arguments.no_verify,
        "report": notes.append,
    }
    average = f", average of {count(snapshots, 'snapshot')}" if arguments.average else ""
    about = f"step {manifest.step}{average}: {manifest.num_parameters:,} parameters"
    is_universal = arguments.format == UNIVERSAL
    size = 12 * manifest.num_parameters if is_universal else manifest.weight_bytes
    with Bar("exporting", size, quiet=arguments.quiet) as shown:
        if is_universal:
            options = {"learning_rate": next_learning_rate(source), "prefix": arguments.prefix}
            folder = export_universal(source, arguments.out, progress=shown.update, **options, **common)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            done = f'{about} in {folder}; load it with "checkpoint": {{"load_universal": true}} in DeepSpeed\'s config'
        else:
            options = {"dtype": arguments.dtype, "file_bytes": int(arguments.file_size * 1e9)}
            files = export(source, arguments.out, arguments.format, progress=shown.update, **options, **common)
            size = sum(file.stat().st_size for file in files)
            done = f"{about}, {size / 1e9:.3f} GB in {arguments.out}"
    trained = config_from(manifest.config)
    mode = trained.act.mode_of(trained.model)
    if arguments.format == "open_mythos" and mode != "reference":
        notes.append(
            f"OpenMythos' class uses halting, but these weights were trained with act.mode={mode}: its logits will "
            "differ"
        )
    values = {"format": arguments.format, "dtype": arguments.dtype, "step": manifest.step}
    values |= {"parameters": manifest.num_parameters, "bytes": size, "average_samples": snapshots * arguments.average}
    print_result(arguments, done, notes, checkpoint=source.folder, out=arguments.out, **values)


def next_learning_rate(source: Checkpoint) -> float | None:
    """The learning rate of the step after a checkpoint; None if it has no settings of an optimizer."""
    if "optim" not in source.manifest.config:
        return None
    config = config_of(source)
    return learning_rate(config.optim, steps_done(source.manifest) + 1, config.train.steps)


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    is_universal, prefix = arguments.format == UNIVERSAL, arguments.prefix
    problems = []
    if is_universal and arguments.dtype != "fp32":
        problems.append(f"--dtype {arguments.dtype}: universal checkpoints hold fp32 values; leave it out")
    if prefix and not is_universal:
        problems.append(f"--prefix {prefix} needs --format {UNIVERSAL}")
    elif prefix and not re.fullmatch(r"(\w+\.)+", prefix):
        problems.append(f"--prefix {prefix!r:.60} is not a prefix of parameter names; give one such as model.")
    if problems:
        raise UserError(problems)
