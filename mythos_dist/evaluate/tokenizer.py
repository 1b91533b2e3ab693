"""The tokenizer of a model: as given, in the folder of its export, or that of its training shards."""

from pathlib import Path

from mythos_dist.config.schema import Config
from mythos_dist.data.manifest import read_shard_manifest
from mythos_dist.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from mythos_dist.errors import UserError


def find_tokenizer(config: Config, folder: Path | None = None, file: Path | None = None) -> Tokenizer:
    """folder: of the weights. file: given by the user.

    Raises UserError if there is none, or if it has more tokens than the model.
    """
    tokenizer = _load(config, folder, file)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"has {tokenizer.vocab_size} tokens, and the model model.vocab_size={config.model.vocab_size}; give the "
            "tokenizer that the model was trained with",
            str(tokenizer.path),
        )
    return tokenizer


def _load(config: Config, folder: Path | None, file: Path | None) -> Tokenizer:
    if file is not None:
        return Tokenizer.load(file)
    for name in (SentencePieceTokenizer.file_name, HuggingFaceTokenizer.file_name) if folder else ():
        if folder and (folder / name).is_file():
            return Tokenizer.load(folder / name)
    shards = Path(next(iter(config.data.folders)))  # all folders of a mix have one tokenizer
    try:
        manifest = read_shard_manifest(shards)
    except UserError as error:
        raise UserError(f"no tokenizer ({error}); name its file with --tokenizer", str(folder or shards)) from None
    return Tokenizer.load(config.data.tokenizer or shards / manifest.tokenizer, manifest.eos)
