"""Encoding each distinct word once: a cache in front of a BPE model, for whole batches of documents.

A text is cut wherever the tokenizer provably never joins two neighbouring bytes; such a piece, a word, is encoded
once and remembered. encode(a + b) == encode(a) + encode(b) at every cut, so the output is that of the plain tokenizer.

SentencePiece (0.2.3, src/bpe_model.cc): BPE merges two neighbouring symbols only if their joint text is a piece, best
score first, leftmost among equals. So no symbol ever covers two bytes that are neighbours in no piece, and merges on
the two sides of them do not see each other. What would break this is refused:
  a normalizer or stripped white space (the text that is merged is not the text that is cut), white space as suffix;
  user-defined pieces (found before any merge) and unused ones (taken apart by the last merge tried anywhere);
  no byte fallback (unknown characters become one token together, across words).
The trap is U+2581: in a text it looks like a space to the model, so nothing is cut beside it.

Byte-level BPE in a tokenizer.json: the model sees one match of a regular expression at a time, and the expressions
known here look neither back nor over a byte that is not white space. A match that holds an ASCII letter ends before
any ASCII character that is none, likewise for digits, and other visible ASCII ends before a space.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import pyarrow as pa
from sentencepiece import sentencepiece_model_pb2

MAX_WORDS = 500_000  # about 90 MB; then the cache is emptied, which changes nothing but the speed
MAX_TOKENS = 4_000_000
MAX_WORD_BYTES = 64  # longer ones are encoded, but not kept
BLOCK_BYTES = (
    1 << 16
)  # of text whose pairs are looked up at once: what the look-up needs stays in the processor's cache
SPACE = "\u2581"  # what SentencePiece writes for a space

LETTERS = np.array([chr(byte).isalpha() and byte < 128 for byte in range(256)])
DIGITS = np.array([48 <= byte < 58 for byte in range(256)])
VISIBLE = np.array([33 <= byte < 127 for byte in range(256)])
ASCII = np.arange(256) < 128
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
CL100K_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REGEXES = (GPT2_REGEX, CL100K_REGEX, CL100K_REGEX.replace("{1,3}", ""))  # the second is Llama 3's, the third Qwen 2's

EncodeWords = Callable[[list[bytes]], Iterable[Sequence[int]]]


class WordCache:
    """Encodes batches of documents; `encode_words` is the plain tokenizer.

    cuts: bool (65536,), whether a text may be cut between two bytes, at first + 256 * second.
    With `prefix`, a space is set before each document.
    """

    def __init__(self, cuts: np.ndarray, encode_words: EncodeWords, prefix: bool = False):
        self._cuts, self._encode_words, self._prefix = cuts, encode_words, prefix
        self._clear()

    def encode(self, data: np.ndarray, ends: np.ndarray, continues: bool) -> tuple[np.ndarray, np.ndarray]:
        """As Tokenizer.encode_documents."""
        if self._prefix:
            data, ends = _with_spaces(data, ends, continues)
        offsets = self._word_offsets(data, ends)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
        words = pa.Array.from_buffers(pa.binary(), len(offsets) - 1, buffers).dictionary_encode()
        slots = self._find(words.dictionary.to_pylist())
        index = words.indices.to_numpy()
        counts = self._counts[slots][index]
        token_ends = np.concatenate([[0], np.cumsum(counts)])
        shift = self._starts[slots][index] - token_ends[:-1]  # from a token's place in the output to that in the cache
        tokens = self._tokens[np.repeat(shift, counts) + np.arange(token_ends[-1])]
        return tokens, np.diff(token_ends[np.searchsorted(offsets, ends)], prepend=0)

    def _word_offsets(self, data: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Where words begin, and the end of the last: int32 (words + 1,)."""
        cut = np.empty(len(data) + 1, dtype=bool)  # before byte i
        pairs = np.ndarray((max(len(data) - 1, 0),), "<u2", buffer=data, strides=(1,))
        for start in range(0, len(pairs), BLOCK_BYTES):
            block = pairs[start : start + BLOCK_BYTES]
            np.take(self._cuts, block, out=cut[start + 1 : start + 1 + len(block)], mode="clip")  # "raise" would copy
        for place in _places(SPACE.encode(), data):
            cut[[place, place + 3]] = False
        cut[0] = True
        cut[ends] = True
        return np.flatnonzero(cut).astype(np.int32)

    def _find(self, words: list[bytes]) -> np.ndarray:
        """The slots of distinct words; new ones are encoded."""
        if len(self._slot_of) > MAX_WORDS or self._starts[self._num_kept] > MAX_TOKENS:
            self._clear()
        slots = np.fromiter(map(self._slot_of.get, words, repeat(-1)), np.int64, len(words))
        missing = np.flatnonzero(slots < 0).tolist()
        if missing:
            missing.sort(key=lambda i: len(words[i]))  # those that are not kept come last
            new = [words[i] for i in missing]
            slots[missing] = np.arange(self._num_kept, self._num_kept + len(new))
            self._store(new)
        return slots

    def _store(self, words: list[bytes]) -> None:
        """Encode `words`, ordered by length, into the slots from `_num_kept` on."""
        ids = list(self._encode_words(words))
        counts = np.fromiter(map(len, ids), np.int64, len(ids))
        slot, first = self._num_kept, int(self._starts[self._num_kept])
        starts = first + np.cumsum(counts)
        self._tokens = _grown(self._tokens, int(starts[-1]))
        self._counts, self._starts = _grown(self._counts, slot + len(ids)), _grown(self._starts, slot + len(ids) + 1)
        self._tokens[first : starts[-1]] = np.fromiter(chain.from_iterable(ids), np.int32, int(counts.sum()))
        self._counts[slot : slot + len(ids)] = counts
        self._starts[slot + 1 : slot + 1 + len(ids)] = starts
        num_short = bisect_right(words, MAX_WORD_BYTES, key=len)
        self._slot_of.update(zip(words[:num_short], range(slot, slot + num_short), strict=True))
        self._num_kept += num_short

    def _clear(self) -> None:
        self._slot_of: dict[bytes, int] = {}
        self._num_kept = 0
        self._tokens = np.zeros(0, dtype=np.int32)  # of all words
        self._starts, self._counts = np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)  # of a slot, in _tokens


def parse_sentencepiece(content: bytes) -> Any:
    """A model file as sentencepiece_model.proto has it: pieces, trainer_spec, normalizer_spec."""
    return vars(sentencepiece_model_pb2)["ModelProto"].FromString(content)  # made on import: pyright cannot see it


def sentencepiece_cuts(model: Any) -> np.ndarray | None:
    """`cuts` of a SentencePiece model whose words can be encoded one by one, or None; see the module's docstring."""
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    plain = normalizer.escape_whitespaces and not normalizer.precompiled_charsmap
    plain = plain and not normalizer.remove_extra_whitespaces and not trainer.treat_whitespace_as_suffix
    whole = all(piece.type not in (kinds.USER_DEFINED, kinds.UNUSED) for piece in model.pieces)
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback or not plain or not whole:
        return None
    pieces = [piece.piece for piece in model.pieces if piece.type == kinds.NORMAL]
    # "\0" is in no piece; text is not cut beside it then, which is always right.
    text = np.frombuffer("\0".join(pieces).replace(SPACE, " ").encode(), dtype=np.uint8).astype(np.int64)
    cuts = np.ones(1 << 16, dtype=bool)
    cuts[text[:-1] + 256 * text[1:]] = False
    return cuts & ~np.repeat(np.arange(256) & 0xC0 == 0x80, 256)  # a character is never cut


def huggingface_cuts(spec: dict[str, Any]) -> np.ndarray | None:
    """The same of a tokenizer.json."""
    model, split = spec["model"], spec["pre_tokenizer"] or {}
    if model.get("type") != "BPE" or model.get("dropout") or spec["normalizer"] is not None:
        return None
    if not all(token["special"] for token in spec["added_tokens"]):  # the others are found in text before the model
        return None
    match split.get("pretokenizers", [split]):
        case [{"type": "ByteLevel", "add_prefix_space": False} as level] if level.get("use_regex", True):
            pass
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if regex in REGEXES:
            pass
        case _:
            return None
    cuts = np.zeros((256, 256), dtype=bool)  # [second, first]
    cuts |= np.outer(ASCII & ~LETTERS, LETTERS) | np.outer(ASCII & ~DIGITS, DIGITS)
    cuts[ord(" ")] |= VISIBLE
    return cuts.reshape(-1)


def _with_spaces(data: np.ndarray, ends: np.ndarray, continues: bool) -> tuple[np.ndarray, np.ndarray]:
    """A space before each document that is not empty, but for a first one that goes on inside a document."""
    starts = np.concatenate([[0], ends[:-1]])
    prefixed = ends > starts
    if continues and len(ends):
        prefixed[0] = False
    shifts = np.cumsum(prefixed)
    out = np.empty(len(data) + int(prefixed.sum()), dtype=np.uint8)
    is_text = np.ones(len(out), dtype=bool)
    is_text[(starts + shifts - 1)[prefixed]] = False
    out[~is_text] = ord(" ")
    out[is_text] = data
    return out, ends + shifts


def _places(symbol: bytes, data: np.ndarray) -> Iterator[int]:
    """Where the three bytes of `symbol` lie."""
    if (data == symbol[1]).any():  # rare in most languages, and ten times as fast as the search
        text = data.tobytes()
        place = text.find(symbol)
        while place >= 0:
            yield place
            place = text.find(symbol, place + 1)


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """`array` with room for at least `size` elements; it doubles, so that growing costs little on the whole."""
    if size <= len(array):
        return array
    grown = np.zeros(max(size, 2 * len(array), 1 << 16), dtype=array.dtype)
    grown[: len(array)] = array
    return grown
