"""A trained model with its tokenizer and chat template, from a run, a checkpoint or an export."""

from pathlib import Path
from typing import NamedTuple

from mythos_dist.checkpoint.restore import load_model
from mythos_dist.data.chat import ChatRenderer
from mythos_dist.data.chat_template import find_renderer
from mythos_dist.data.manifest import ChatTemplate
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.data.tokenizer_files import find_tokenizer
from mythos_dist.model.mythos import Mythos
from mythos_dist.urls import AnyPath, any_path


class Trained(NamedTuple):
    """A trained model and what is needed to use it."""

    model: Mythos
    n_loops: int  # of training, on average
    step: int
    tokenizer: Tokenizer
    template: ChatTemplate | None  # of conversations; None: the tokenizer has none

    def renderer(self, template: str | None) -> ChatRenderer:
        """With the template `template`, or that of training or the tokenizer. UserError if there is none."""
        if template is None and self.template:
            return ChatRenderer(self.template, tuple(self.tokenizer.special_tokens))
        return find_renderer(self.tokenizer, template)


def load_trained(path: str | AnyPath, tokenizer_file: Path | None = None, quiet: bool = True) -> Trained:
    """The model at `path` (a run, checkpoint or export) with its own tokenizer, that of its shards, or the given one.
    With a bar unless `quiet`.

    Raises UserError if a part is missing or damaged.

    >>> from mythos_dist import load_trained
    >>> trained = load_trained("runs/first")
    >>> trained.step, trained.n_loops, trained.tokenizer.eos
    (3, 2, '</s>')
    """
    path = any_path(path) if isinstance(path, str) else path
    model, config, step = load_model(path, quiet)
    model_tokenizer = find_tokenizer(path.expanduser(), config.data, tokenizer_file)
    return Trained(model, config.loops.mean_of(config.model), step, model_tokenizer.tokenizer, model_tokenizer.template)
