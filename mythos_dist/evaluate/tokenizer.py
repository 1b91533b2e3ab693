"""The tokenizer of an evaluated model."""

from pathlib import Path

from mythos_dist.config.schema import Config
from mythos_dist.data import tokenizer_files
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.urls import AnyPath


def evaluation_tokenizer(config: Config, folder: AnyPath, file: Path | None = None) -> Tokenizer:
    """The tokenizer in `file`; else that of the export `folder`, or of the shards of the run.

    Raises UserError if there is none, or if it has more tokens than the model.
    """
    tokenizer = tokenizer_files.find_tokenizer(folder, config.data, file).tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"has {tokenizer.vocab_size} tokens, and the model model.vocab_size={config.model.vocab_size}; give the "
            "tokenizer that the model was trained with",
            str(tokenizer.path),
        )
    return tokenizer
