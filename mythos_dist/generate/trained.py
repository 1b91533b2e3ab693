"""A trained model with its tokenizer and chat template, from a run, a checkpoint or an export."""

from pathlib import Path
from typing import NamedTuple

from mythos_dist.checkpoint.restore import load_model
from mythos_dist.data.chat import ChatRenderer
from mythos_dist.data.chat_template import find_renderer
from mythos_dist.data.manifest import ShardManifest, read_shard_manifest
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.model.mythos import Mythos


class Trained(NamedTuple):
    """A trained model and what is needed to use it."""

    model: Mythos
    n_loops: int  # of training, on average
    step: int
    tokenizer: Tokenizer
    shards: ShardManifest | None  # of training; None with a tokenizer of its own

    def renderer(self, template: str | None) -> ChatRenderer:
        """With the template `template`, that of the training shards, or the tokenizer's. UserError if there is none."""
        if template is None and self.shards and self.shards.chat:
            return ChatRenderer(self.shards.chat, tuple(self.tokenizer.special_tokens))
        return find_renderer(self.tokenizer, template)


def load_trained(path: Path, tokenizer_file: Path | None) -> Trained:
    """The model at `path` with the tokenizer of its shards, or the given one. Raises UserError."""
    model, config, step = load_model(path)
    shards = Path(next(iter(config.data.folders)))  # all folders of a mix share one tokenizer
    if tokenizer_file:
        tokenizer, manifest = Tokenizer.load(tokenizer_file), None
    else:
        try:
            manifest = read_shard_manifest(shards)
        except UserError as error:
            raise UserError(f"no tokenizer ({error}); name its file with --tokenizer", str(path)) from None
        tokenizer = Tokenizer.load(config.data.tokenizer or shards / manifest.tokenizer, manifest.eos)
    return Trained(model, config.loops.mean_of(config.model), step, tokenizer, manifest)
