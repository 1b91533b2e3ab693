"""Tokenizers: documents to token ids and back, from a SentencePiece model or a Hugging Face tokenizer.json.

decode(encode(text)) == text for models trained here: identity normalization, no dummy prefix, white space kept, byte
fallback. EOS alone separates documents, so no text may encode to it: EOS must be a control piece, or a special token,
which is not matched in text. A model without such an EOS is refused on load.
The trap is U+2581: SentencePiece represents a space by that character, so a literal one would decode to a space;
models trained here encode it as its three byte pieces instead.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm

from mythos_dist.data.manifest import read_json
from mythos_dist.data.word_cache import (
    SPACE,
    WordCache,
    huggingface_boundaries,
    parse_sentencepiece,
    sentencepiece_boundaries,
)
from mythos_dist.errors import UserError, first_line

WORDS_PER_CALL = 4096  # bounds memory: an Encoding of `tokenizers` takes hundreds of bytes
COMMON_EOS = "<|endoftext|> </s> <eos> <EOS> [EOS] <|end_of_text|> <|eos|>".split()
# From many scripts and planes: a tokenizer with a limited alphabet does not know all of them.
RARE = "éßЖאعไ語한₿🙂\u0939\u0d85\u10d0\u1200\U00010330\U0001f9ff\U0002070e"
PROBE = "  The  trick's  12345 (of) it,\n\n\tall:   naïve, \u00a0日本語 e\u0301 🙂🙂\r\n x=y+1; \x01\x7f the end. \n "


class Tokenizer:
    """Base of both kinds, SentencePiece and tokenizer.json; create one with `load`.

    >>> from mythos_dist import Tokenizer
    >>> tokenizer = Tokenizer.load("shards/tokenizer.model")
    >>> ids = tokenizer.encode("import torch")  # int32 of shape (tokens,), without EOS
    >>> tokenizer.decode(ids), tokenizer.eos
    ('import torch', '</s>')
    """

    file_name: str  # in a folder of shards
    eos: str  # the text of the token that ends documents
    eos_id: int
    vocab_size: int  # the largest possible id + 1
    unk_id: int | None = None  # of the unknown token; None: every character can be encoded
    bos: str | None = None  # the text of the token that begins sequences
    special_tokens: dict[str, int]  # the texts of control pieces or special tokens, which `encode` does not match

    def __init__(self, path: Path, content: bytes):
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._words: WordCache | None = None
        self._drops_space = False  # whether the rest of a split document is encoded without its leading space

    @staticmethod
    def load(path: str | Path, eos: str | None = None) -> "Tokenizer":
        """`eos`: the text of the EOS token, if the file does not name it.

        Raises UserError if the file is missing or not a tokenizer, or if text can encode to its EOS.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError("no such file; train a tokenizer with `mythos tokenizer`", str(path))
        content = path.read_bytes()
        is_json = path.suffix == ".json" or content.lstrip()[:1] == b"{"
        tokenizer = (HuggingFaceTokenizer if is_json else SentencePieceTokenizer)(path, content, eos)
        try:
            tokenizer._probe()
        except UserError:
            raise
        except Exception as error:  # the libraries raise no narrower type
            raise UserError(
                f"cannot encode some texts ({first_line(error)}); use another tokenizer", str(path)
            ) from None
        return tokenizer

    @property
    def cached(self) -> bool:
        """Whether each distinct word is encoded only once (word_cache.py)."""
        return self._words is not None

    def encode(self, text: str) -> np.ndarray:
        """int32 of shape (tokens,), never containing `eos_id`; a lone surrogate is encoded as "?"."""
        return self._encode(text.encode("utf-8", "replace"))

    def encode_documents(
        self, data: np.ndarray, ends: np.ndarray, continues: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode documents that are concatenated in `data` (uint8, valid UTF-8) and end at `ends` (int64, (n,)).

        continues: the first one continues the previous call's last document, which was split at `split_point`.
        Returns all tokens, int32, without EOS, and each document's number of tokens, int64 (n,).
        """
        if self._words is not None:
            return self._words.encode(data, ends, continues)
        buffer = data.tobytes()
        texts = [buffer[start:end] for start, end in pairwise([0, *ends.tolist()])]
        ids = []
        for i, text in enumerate(texts):
            ids.append(self._encode_rest(text) if continues and i == 0 else self._encode(text))
        return np.concatenate([np.zeros(0, np.int32), *ids]), np.fromiter(map(len, ids), np.int64, len(ids))

    def encode_rendered(self, text: str, continues: bool) -> np.ndarray:
        """Encode a chat template's text, in which the texts of special tokens are those tokens. int32 (tokens,).

        continues: other text precedes it. A lone surrogate is encoded as "?".
        """
        raise NotImplementedError

    def split_point(self, data: np.ndarray, limit: int) -> int:
        """Where to split a document of more than `limit` bytes: before the last space within `limit` that ends a word.

        The two parts then encode to the same tokens as the full text, except that a unigram model's ties depend on
        rounding. Text without such a space is split between two characters.
        """
        before, after = data[:limit], data[1 : limit + 1]
        space = after == ord(" ")
        # A space after visible ASCII is safe with every tokenizer, so it is preferred.
        for ends_word in ((before > 32) & (before < 127), before != ord(" ")):
            positions = np.flatnonzero(space & ends_word[: len(space)])
            if len(positions):
                return int(positions[-1]) + 1
        position = limit
        while data[position] & 0xC0 == 0x80:
            position -= 1
        assert position > 0, f"no character ends within {limit} bytes"
        return position

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; control pieces such as EOS decode to the empty string."""
        raise NotImplementedError

    def _encode(self, text: bytes) -> np.ndarray:
        raise NotImplementedError

    def _encode_rest(self, text: bytes) -> np.ndarray:
        """Encode the rest of a split document: a dummy prefix replaces its leading space."""
        return self._encode(text[1:] if self._drops_space and text.startswith(b" ") else text)

    def _probe(self) -> None:
        """Check by encoding texts: text cannot encode to EOS, and no character is lost (UserError). Find out how the
        rest of a split document must be encoded, and turn the word cache off if it changes the tokens."""
        for text in (self.eos, f"a {self.eos}b"):
            if self.eos_id in self.encode(text):
                problem = f"the text {self.eos!r} encodes to EOS, which must only separate documents"
                raise UserError(f"{problem}; use another tokenizer, or pass --eos with another token", str(self.path))
        if lost := [character for character in RARE if not len(self.encode(character))]:
            raise UserError(
                f"loses characters: {' '.join(lost[:5])} encode to no tokens, because it has neither an unknown token "
                "nor byte fallback; use a byte-level tokenizer, or train one with `mythos tokenizer`",
                str(self.path),
            )
        first, full = self.encode("xx").tolist(), self.encode("xx yy").tolist()
        with_space, without_space = first + self.encode(" yy").tolist(), first + self.encode("yy").tolist()
        self._drops_space = full == without_space and full != with_space
        texts = [PROBE.encode(), b"", PROBE[2:].encode(), b"a" * 100]
        ids = [self._encode(text) for text in texts]
        tokens, counts = self.encode_documents(
            np.frombuffer(b"".join(texts), dtype=np.uint8), np.cumsum([len(text) for text in texts])
        )
        if not np.array_equal(tokens, np.concatenate(ids)) or counts.tolist() != [len(one) for one in ids]:
            self._words = None


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    file_name = "tokenizer.model"

    def __init__(self, path: Path, content: bytes, eos: str | None):
        super().__init__(path, content)
        try:
            if not content:  # SentencePiece would load it and print errors later
                raise RuntimeError("the file is empty")
            self._model = spm.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"not a SentencePiece model ({sentencepiece_reason(error)})", str(path)) from None
        self.vocab_size = int(self._model.get_piece_size())
        self.eos_id = int(self._model.eos_id() if eos is None else self._model.piece_to_id(eos))
        if self.eos_id < 0 or not self._model.is_control(self.eos_id):  # "</s>" may be a user-defined piece
            name = "EOS" if eos is None else repr(eos)
            problem = f"the model has no {name} control piece to separate documents; train a model with one"
            raise UserError(problem, str(path))
        self.eos = self._model.id_to_piece(self.eos_id)
        if self._model.bos_id() >= 0:
            self.bos = self._model.id_to_piece(self._model.bos_id())
        controls = (i for i in range(self.vocab_size) if self._model.is_control(i))
        self.special_tokens = {self._model.id_to_piece(i): i for i in controls}
        self._set_up(parse_sentencepiece(content))

    def _set_up(self, proto: Any) -> None:
        """Choose by the model's white-space rules how U+2581 and split documents are encoded, and create the cache."""
        normalizer, prefix = proto.normalizer_spec, proto.normalizer_spec.add_dummy_prefix
        keeps_spaces = not (prefix or normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap)
        self._space_bytes = None  # the ids of a literal U+2581, if the text on its two sides may be encoded separately
        if keeps_spaces and proto.trainer_spec.byte_fallback:
            pieces = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
            self._space_bytes = np.array([self._model.piece_to_id(piece) for piece in pieces], dtype=np.int32)
        if not proto.trainer_spec.byte_fallback:
            self.unk_id = int(self._model.unk_id())
        self._no_prefix_model = self._model
        if prefix:
            normalizer.add_dummy_prefix = False
            self._no_prefix_model = spm.SentencePieceProcessor(model_proto=proto.SerializeToString())
        boundaries = sentencepiece_boundaries(proto)
        if boundaries is not None:
            self._words = WordCache(boundaries, self._encode_words, prefix)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(np.asarray(ids, dtype=np.int64).tolist())

    def encode_rendered(self, text: str, continues: bool) -> np.ndarray:
        ids = [np.empty(0, np.int32)]
        for part in re.split(f"({any_of(tuple(self.special_tokens)).pattern})", text):
            if part in self.special_tokens:
                ids.append(np.array([self.special_tokens[part]], np.int32))
            elif part:
                encode = self._encode_rest if continues or len(ids) > 1 else self._encode
                ids.append(encode(part.encode("utf-8", "replace")))
        return np.concatenate(ids)

    def _encode(self, text: bytes) -> np.ndarray:
        if self._space_bytes is not None and not text.isascii() and SPACE.encode() in text:
            first, *rest = (self._model.encode(part, out_type="numpy") for part in text.split(SPACE.encode()))
            return np.concatenate([first, *(ids for part in rest for ids in (self._space_bytes, part))])
        return self._model.encode(text, out_type="numpy")

    def _encode_rest(self, text: bytes) -> np.ndarray:
        if text.startswith(b" ") or self._no_prefix_model is self._model:
            return super()._encode_rest(text)
        return self._no_prefix_model.encode(text, out_type="numpy")

    def _encode_words(self, words: list[bytes]) -> list[Sequence[int]]:
        # As fast as one call for all words joined.
        ids = self._no_prefix_model.encode(words, out_type=int, num_threads=1)
        if self._space_bytes is not None:
            for i, word in enumerate(words):
                if SPACE.encode() in word:
                    ids[i] = self._encode(word).tolist()
        return ids


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. Special tokens are not matched in text; its padding and truncation are ignored.

    `tokenizers` runs in one thread: its thread pool does not survive the fork of the converter's workers.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: Path, content: bytes, eos: str | None):
        super().__init__(path, content)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            import tokenizers

            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except ImportError:
            raise UserError("a tokenizer.json needs a package; pip install tokenizers", str(path)) from None
        except Exception as error:  # the library raises no narrower type
            raise UserError(f"not a tokenizer.json that can be read ({error})", str(path)) from None
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special = {token.content: i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        self.eos = _find_eos(eos or token_text(read_configuration(path.parent, "eos_token")), list(special), path)
        self.eos_id, self.special_tokens = special[self.eos], special
        spec = json.loads(self._model.to_str())
        self.unk_id = _unknown_id(spec["model"], self._model)
        boundaries = huggingface_boundaries(spec)
        if boundaries is not None:
            self._words = WordCache(boundaries, self._encode_words)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode(np.asarray(ids, dtype=np.int64).tolist())

    def encode_rendered(self, text: str, continues: bool) -> np.ndarray:
        if continues and self._drops_space:
            text = text.removeprefix(" ")
        self._model.encode_special_tokens = False
        try:
            valid = text.encode("utf-8", "replace").decode()
            return np.array(self._model.encode(valid, add_special_tokens=False).ids, dtype=np.int32)
        finally:
            self._model.encode_special_tokens = True

    def _encode(self, text: bytes) -> np.ndarray:
        encoding = self._model.encode_batch_fast([text.decode()], add_special_tokens=False)[0]
        return np.array(encoding.ids, dtype=np.int32)

    def _encode_words(self, words: list[bytes]) -> Iterator[Sequence[int]]:
        for start in range(0, len(words), WORDS_PER_CALL):
            texts = [word.decode() for word in words[start : start + WORDS_PER_CALL]]
            for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False):
                yield encoding.ids


def _unknown_id(model: dict[str, Any], tokenizer: Any) -> int | None:
    """The id of a tokenizer.json's unknown token; None if it has none or falls back to bytes."""
    if model.get("byte_fallback"):
        return None
    return model["unk_id"] if model.get("unk_id") is not None else tokenizer.token_to_id(model.get("unk_token") or "")


def _find_eos(eos: str | None, special: list[str], path: Path) -> str:
    """`eos`, or else the only special token with a common name of EOS."""
    names = [eos] if eos else [name for name in COMMON_EOS if name in special]
    if len(names) == 1 and names[0] in special:
        return names[0]
    problem = f"{eos!r} is not a special token of this file" if eos else "the file does not name its EOS token"
    choices = " ".join(special) or "(the file has no special tokens)"
    raise UserError(f"{problem}; pass --eos with one of: {choices}", str(path))


def read_configuration(folder: Path, key: str) -> Any:
    """A value in the configuration files next to a tokenizer.json; None if they have none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            value = read_json((folder / name).read_bytes()).get(key)
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError):
            raise UserError("not valid JSON; fix or remove it, or pass --eos", str(folder / name)) from None
        if value:
            return value
    return None


@functools.cache
def any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Matches any of these texts, the longest where several begin."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def token_text(token: Any) -> str | None:
    """The text of a special token in a configuration file, where it is a text or an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def sentencepiece_reason(error: RuntimeError) -> str:
    """SentencePiece's message without its source location: 'INTERNAL: x.cc(1) [a <= b] Reason' -> 'Reason'."""
    return re.sub(r"^.*\.cc\(\d+\) \[.*\] ?", "", str(error)).removeprefix("INTERNAL: ").strip() or "unreadable"
