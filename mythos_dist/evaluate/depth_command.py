"""`mythos depth-sweep`: a checkpoint over the number of loops, on held-out data and token by token on a text."""

import argparse
import json
import sys
from pathlib import Path

from mythos_dist.checkpoint.restore import load_model, open_weights_at
from mythos_dist.config.schema import Config
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.data.tokenizer_files import evaluation_tokenizer
from mythos_dist.errors import UserError
from mythos_dist.evaluate.depth_page import depth_page
from mythos_dist.evaluate.depth_text import TextDepths, measure_text
from mythos_dist.files import reason, write_atomically
from mythos_dist.parallel.process import device
from mythos_dist.progress import Bar
from mythos_dist.train.evaluation import draw_curves
from mythos_dist.train.sweep import parse_loops, sweep_model, write_json


def run(arguments: argparse.Namespace) -> None:
    """Sweep, and write and print the results. Raises UserError."""
    loops, problems = parse_loops(arguments.loops)
    sizes = {"samples": arguments.samples, "batch": arguments.batch}
    problems += [f"--{name}={value} must be at least 1" for name, value in sizes.items() if value < 1]
    out: Path | None = arguments.out
    if out is None and isinstance(arguments.checkpoint, Path):
        out = arguments.checkpoint / "depth-sweep"
    if out is None:
        problems.append(f"{arguments.checkpoint} is in a store, and results are written to a local folder; name --out")
    if problems or out is None:
        raise UserError(problems)
    folder = open_weights_at(arguments.checkpoint).folder
    text = None if arguments.text is None else _read_text(arguments.text)
    out.parent.mkdir(parents=True, exist_ok=True)  # fail before the sweep, not after
    model, config, step = load_model(folder, quiet=False)
    page = []
    if text is not None:
        tokenizer = evaluation_tokenizer(config, folder, arguments.tokenizer)
        depths = measure_text(model.to(device()), tokenizer, text, max(loops))
        page.append(_write_page(Path(f"{out}.html"), arguments, config, step, depths, tokenizer))
    with Bar("evaluating", unit=" loops") as shown:
        result = sweep_model(
            *(model, config, step, loops),
            data=arguments.data,
            samples=arguments.samples,
            batch=arguments.batch,
            progress=shown.show,
        )
    write_json(Path(f"{out}.json"), result.to_json())
    draw_curves(Path(f"{out}.png"), {f"step {result.step}": result.curve}, result.trained)
    if arguments.json:
        print(json.dumps(result.to_json()))
        return
    print("loops  loss    accuracy")
    for n, one in result.curve.items():
        print(f"{n:5d}  {one.loss:.4f}  {one.accuracy:.1%}")
    overthinking_from = result.to_json()["overthinking_from"]
    note = f"; overthinking with {overthinking_from} loops or more" if overthinking_from else ""
    print(f"{', '.join([f'{out}.json', f'{out}.png', *page])}{note}")


def _read_text(file: Path) -> str:
    """The text of a file, or of standard input (-). Raises UserError."""
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read as text ({reason(error)}); give a UTF-8 file to --text", str(file)) from None


def _write_page(
    file: Path, arguments: argparse.Namespace, config: Config, step: int, depths: TextDepths, tokenizer: Tokenizer
) -> str:
    """Write the page about a text. Returns its path. Raises UserError for a criterion that the model does not have."""
    criterion = arguments.exit
    if criterion not in depths.measures:
        raise UserError(
            f"--exit={criterion}: act.mode={config.act.mode_of(config.model)} has no halting weights; choose one of "
            f"{', '.join(depths.measures)}"
        )
    threshold = depths.thresholds[criterion] if arguments.exit_threshold is None else arguments.exit_threshold
    title = f"Loops per token after step {step}"
    write_atomically(file, depth_page(title, depths, tokenizer, criterion, threshold))
    return str(file)
