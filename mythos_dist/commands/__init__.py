"""The commands of `mythos`: one list, from which `mythos --help`, completion and the reference are made.

Each module has `build_parser()`, which imports nothing slow, and `main()`. The files of tools/ are other names of them.
"""

import argparse
import importlib
from typing import NamedTuple


class Command(NamedTuple):
    """A command: what is typed after `mythos` (one or two words), and the module that implements it."""

    name: str
    module: str
    help: str  # one line for the list of commands
    group: str
    is_tool: bool = True  # as for `errors.run_command`

    def load_parser(self) -> argparse.ArgumentParser:
        """The command's parser, with the name under which `mythos` runs it. Imports no torch."""
        parser: argparse.ArgumentParser = importlib.import_module(self.module).build_parser()
        parser.prog = f"mythos {self.name}"
        return parser


_HERE = __name__
DATA, TRAINING, CHECKPOINTS, MODELS, SHELL = "data", "training", "checkpoints", "trained models", "shell"

COMMANDS = (
    Command("demo", f"{_HERE}.demo", "train, kill, resume and sample a small model on 4 CPU ranks", TRAINING),
    Command("sample-data", f"{_HERE}.make_sample_data", "make shards of a small text without a download", DATA),
    Command("tokenizer", f"{_HERE}.train_tokenizer", "train a SentencePiece tokenizer", DATA),
    Command("shards", f"{_HERE}.make_shards", "convert text or conversations to shards", DATA),
    Command("import tokens", f"{_HERE}.import_tokens", "convert token files of other trainers to shards", DATA),
    Command("verify", f"{_HERE}.verify_shards", "check that shards are complete and undamaged", DATA),
    Command("plan", f"{_HERE}.plan", "find a layout; memory, step time and cost in advance", TRAINING),
    Command("doctor", "mythos_dist.doctor", "check this machine: driver, kernels, network, disk, shards", TRAINING),
    Command("train", "mythos_dist.train.__main__", "train, or resume, a run", TRAINING, is_tool=False),
    Command("submit", f"{_HERE}.submit", "check a layout and submit it to SLURM", TRAINING),
    Command(
        "status", f"{_HERE}.status", "whether a run is running, completed, requeued, stopped, hung or dead", TRAINING
    ),
    Command("report", f"{_HERE}.report", "write an HTML report of runs", TRAINING),
    Command("inspect", f"{_HERE}.inspect_checkpoint", "describe, check and compare checkpoints", CHECKPOINTS),
    Command("export", f"{_HERE}.export_checkpoint", "export weights, also for transformers", CHECKPOINTS),
    Command("import hf", f"{_HERE}.import_hf", "import a model from Hugging Face's transformers", CHECKPOINTS),
    Command("retrofit", f"{_HERE}.retrofit", "make a looped model of a pretrained one", CHECKPOINTS),
    Command("import deepspeed", f"{_HERE}.import_deepspeed", "continue a training of DeepSpeed's", CHECKPOINTS),
    Command("import open-mythos", f"{_HERE}.import_open_mythos", "start from OpenMythos' weights", CHECKPOINTS),
    Command("average", f"{_HERE}.average_checkpoints", "average the weights of several checkpoints", CHECKPOINTS),
    Command("reshape", f"{_HERE}.reshape_checkpoint", "rewrite a checkpoint as few files of full tensors", CHECKPOINTS),
    Command("generate", f"{_HERE}.generate", "continue texts, or chat", MODELS),
    Command("evaluate", f"{_HERE}.evaluate", "scores on tasks, and perplexities, over the number of loops", MODELS),
    Command("depth-sweep", f"{_HERE}.depth_sweep", "held-out loss over the number of loops", MODELS),
    Command("decoding-quality", f"{_HERE}.decoding_quality", "the cost of smaller caches and early exits", MODELS),
    Command("serve", f"{_HERE}.serve", "serve a model with OpenAI's API", MODELS),
    Command("completion", f"{_HERE}.completion", "print the code that completes commands in your shell", SHELL),
)
GROUPS = (DATA, TRAINING, CHECKPOINTS, MODELS, SHELL)
