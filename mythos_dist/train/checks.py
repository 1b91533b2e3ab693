"""Checks on every rank before anything is built or written; each raises one UserError with all its problems."""

import os
import shutil

from mythos_dist.checkpoint.reader import Checkpoint
from mythos_dist.config.compare import differences
from mythos_dist.config.schema import Config
from mythos_dist.data.corpora import Corpus, data_changes, open_corpora
from mythos_dist.data.manifest import SPLITS
from mythos_dist.errors import UserError
from mythos_dist.model.attend import Kernel, choose_kernel
from mythos_dist.model.megablocks import check_megablocks
from mythos_dist.parallel.process import DTYPES, check_dtype, device
from mythos_dist.train.feed import open_shard_cache
from mythos_dist.train.run_folder import check_run_folder
from mythos_dist.train.sinks import check_sinks


def check_inputs(config: Config) -> list[Corpus]:
    """The shards; UserError for what the user has to fix."""
    check_dtype(config.train.dtype)
    check_kernels(config)
    check_sinks(config)
    check_run_folder(config)
    corpora = open_data(config)
    open_shard_cache(config, corpora)
    return corpora


def open_data(config: Config) -> list[Corpus]:
    """The shards of a config. Raises UserError with all that is wrong with them."""
    data = config.data
    return open_corpora(
        data.mix_begin,
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        tokenizer_path=config.data.tokenizer,
        splits=SPLITS if config.train.eval_samples else ["train"],
        mix_end=data.mix_end,
        change=data.mix_samples,
        cache=data.cache,
    )


def check_kernels(config: Config) -> str:
    """The kernels that run experts and attention, as text; UserError with all reasons if requested ones cannot run."""
    results, problems = [], []
    for check in (choose_attention, check_experts, check_compiler):
        try:
            results.append(check(config))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return f"experts: {config.experts.backend}, attention: {results[0]}"


def choose_attention(config: Config) -> Kernel:
    """The kernel for `train.attention` on this rank's device. Raises UserError."""
    return choose_kernel(config.train.attention, device(), DTYPES[config.train.dtype], config.model)


def check_experts(config: Config) -> None:
    """UserError if the kernels of `experts.backend` cannot run."""
    if config.experts.backend == "megablocks":
        check_megablocks(DTYPES[config.train.dtype])


def check_compiler(config: Config) -> None:
    """UserError if `train.compile` has no C++ compiler, which it needs on a CPU."""
    compiler = os.environ.get("CXX", "g++")
    if config.train.compile and device().type == "cpu" and not shutil.which(compiler):
        raise UserError(f"train.compile=true: there is no C++ compiler {compiler}; install one, or set it to false")


def check_checkpoint(config: Config, checkpoint: Checkpoint, corpora: list[Corpus]) -> None:
    """UserError if a run with this config and these shards cannot resume from a checkpoint, with all differences."""
    manifest = checkpoint.manifest
    problems = [
        f"{name}={value}, but {checkpoint.folder} was saved with {old}"
        for name, old, value in differences(manifest.config, config)
    ]
    settings = ["these"] if problems else []
    if manifest.data and (changed := data_changes(corpora, manifest.data)):
        problems += changed
        settings.append("data.path" if config.data.mix is None else "data.mix")
    if problems:
        remedy = f"set {' and '.join(settings)} back to resume the run in run.dir={config.run.dir}"
        raise UserError([*problems, f"{remedy}, or give another run.dir"])
