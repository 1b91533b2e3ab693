"""The tokenizer of a model in the folder of an export: the file that training used, and what transformers reads.

    tokenizer.model          a SentencePiece model, as it is
    tokenizer.json           as it is, but for a post-processor that adds tokens; of a SentencePiece model converted
    tokenizer_config.json    special tokens, and the chat template

`AutoTokenizer.from_pretrained(folder)` gives the ids of training, in which nothing is added to a text. In Hugging
Face's way it reads the texts of special tokens as those tokens, unless split_special_tokens=True.

Decisions: HF-2.
"""

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from mythos_dist.config.schema import Config, DataConfig
from mythos_dist.data.chat_template import own_template, special_token_names
from mythos_dist.data.manifest import ChatTemplate, ShardManifest
from mythos_dist.data.remote import MAX_TOKENIZER, read_manifest, tokenizer_path
from mythos_dist.data.tokenizer import SentencePieceTokenizer, Tokenizer, read_configuration, token_text
from mythos_dist.data.tokenizer_json import convert_sentencepiece
from mythos_dist.errors import UserError
from mythos_dist.files import write_and_fsync
from mythos_dist.store.fetch import read_object
from mythos_dist.store.folder import list_folder
from mythos_dist.urls import AnyPath, RemotePath

FILES = (SentencePieceTokenizer.file_name, "tokenizer.json")  # the first that exists is training's


class ModelTokenizer(NamedTuple):
    """A model's tokenizer, and how conversations with the model are rendered."""

    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    shards: ShardManifest | None = None  # of training, if they are available


def tokenizer_in(folder: Path) -> ModelTokenizer | None:
    """The tokenizer of an export; None if it has none. Raises UserError if it cannot be read."""
    for name in FILES:
        if (folder / name).is_file():
            tokenizer = Tokenizer.load(folder / name, token_text(read_configuration(folder, "eos_token")))
            return ModelTokenizer(tokenizer, own_template(tokenizer))
    return None


def find_tokenizer(folder: AnyPath, data: DataConfig, file: Path | None = None) -> ModelTokenizer:
    """The tokenizer in `file`; else that of the export `folder`, which may be in a store, or of the shards that a run
    reads.

    Raises UserError if there is none, as where shards are on another cluster.
    """
    if file is not None:
        return ModelTokenizer(tokenizer := Tokenizer.load(file), own_template(tokenizer))
    if exported := tokenizer_in(folder if isinstance(folder, Path) else _download(folder)):
        return exported
    shard_folder = next(iter(data.folders))  # all folders of a mix share one tokenizer
    try:
        if not shard_folder:
            raise UserError("this export has none")
        shards = read_manifest(shard_folder)
        path = tokenizer_path(data.tokenizer, shard_folder, shards, data.cache)
    except UserError as error:
        raise UserError(f"no tokenizer ({error}); name its file with --tokenizer", str(folder)) from None
    tokenizer = Tokenizer.load(path, shards.eos)
    return ModelTokenizer(tokenizer, shards.chat or own_template(tokenizer), shards)


def evaluation_tokenizer(config: Config, folder: AnyPath, file: Path | None = None) -> Tokenizer:
    """The tokenizer in `file`; else that of the export `folder`, or of the shards of the run.

    Raises UserError if there is none, or if it has more tokens than the model.
    """
    tokenizer = find_tokenizer(folder, config.data, file).tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"has {tokenizer.vocab_size} tokens, and the model model.vocab_size={config.model.vocab_size}; give the "
            "tokenizer that the model was trained with",
            str(tokenizer.path),
        )
    return tokenizer


def _download(folder: RemotePath) -> Path:
    """A temporary folder, until this process ends, with the tokenizer of an export in a store, if there is one."""
    local = Path(tempfile.mkdtemp(prefix="mythos-tokenizer-"))
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    files = list_folder(folder).files
    for name in (*FILES, "tokenizer_config.json"):
        if name in files:
            (local / name).write_bytes(read_object((folder / name).url, MAX_TOKENIZER))
    return local


def write_tokenizer(folder: Path, files: ModelTokenizer, max_tokens: int) -> str:
    """Write the files into `folder`. Returns a note if transformers will not find a tokenizer, else an empty string.

    max_tokens: the model's context.
    """
    tokenizer, template = files.tokenizer, files.template
    note = ""
    if isinstance(tokenizer, SentencePieceTokenizer):
        shutil.copyfile(tokenizer.path, folder / tokenizer.file_name)
        converted = convert_sentencepiece(tokenizer)
        if converted is None:
            note = (
                f"{tokenizer.path} has rules that a tokenizer.json cannot express, so AutoTokenizer finds no "
                f"tokenizer; load {tokenizer.file_name} with sentencepiece"
            )
        else:
            write_and_fsync(folder / "tokenizer.json", converted)
    else:
        write_and_fsync(folder / "tokenizer.json", _without_added_tokens(tokenizer.path.read_bytes()))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_tokens,
        "padding_side": "left",  # for generation; attention masks make the side irrelevant for training
        **_special_tokens(tokenizer, template),
    }
    if template is not None:
        settings["chat_template"] = template.text
    write_and_fsync(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return note


def _special_tokens(tokenizer: Tokenizer, template: ChatTemplate | None) -> dict[str, str]:
    """By their names in tokenizer_config.json. EOS pads, if no other token does: padded labels are not in the loss."""
    tokens = {"pad_token": tokenizer.eos, **special_token_names(tokenizer)}
    return tokens if template is None else tokens | template.tokens


def _without_added_tokens(content: bytes) -> str:
    """A tokenizer.json that neither adds tokens to a text, nor pads or truncates it: training does none of these."""
    spec = json.loads(content)
    for key in ("padding", "truncation"):
        spec[key] = None
    if (spec.get("post_processor") or {}).get("type") != "ByteLevel":  # which changes offsets only
        spec["post_processor"] = None
    return json.dumps(spec, ensure_ascii=False)
