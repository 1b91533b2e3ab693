"""A word cache in front of a BPE model: each distinct word of a batch of documents is encoded once.

Text is split wherever the tokenizer provably never merges across two adjacent bytes. The parts, words, are encoded
once and cached. encode(a + b) == encode(a) + encode(b) at every such boundary, so the output is the tokenizer's own.

SentencePiece (0.2.3, src/bpe_model.cc): BPE merges two adjacent symbols only if their joint text is a piece, best
score first, leftmost among equals. So no symbol ever spans two bytes that are adjacent in no piece, and merges on
either side of them are independent. Models for which that is false are not cached:
  a normalizer or stripped white space (the merged text differs from the text that is split), white space as suffix;
  user-defined pieces (matched before any merge) and unused pieces (split again by the last merge tried anywhere);
  no byte fallback (adjacent unknown characters become one token, across words).
The trap is U+2581: in a text the model takes it for a space, so there is no boundary next to it.

Byte-level BPE in a tokenizer.json: the model sees one match of a regular expression at a time, and the expressions
supported here have no look-behind and no look-ahead beyond white space. A match with an ASCII letter ends before any
other ASCII character, the same holds for digits, and other visible ASCII ends before a space.

Decisions: DATA-10.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import pyarrow as pa
from sentencepiece import sentencepiece_model_pb2

MAX_WORDS = 500_000  # about 90 MB; beyond it the cache is cleared, which changes only the speed
MAX_TOKENS = 4_000_000
MAX_WORD_BYTES = 64  # longer words are encoded, but not cached
BLOCK_BYTES = 1 << 16  # of text per table look-up: its arrays stay in the processor's cache
SPACE = "\u2581"  # SentencePiece's symbol for a space

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
    """Encodes batches of documents; `encode_words` is the tokenizer without the cache.

    boundaries: bool (65536,), whether text may be split between two bytes, at index first + 256 * second.
    With `prefix`, a space is put before each document.
    """

    def __init__(self, boundaries: np.ndarray, encode_words: EncodeWords, prefix: bool = False):
        self._boundaries, self._encode_words, self._prefix = boundaries, encode_words, prefix
        self._clear()

    def encode(self, data: np.ndarray, ends: np.ndarray, continues: bool) -> tuple[np.ndarray, np.ndarray]:
        """As Tokenizer.encode_documents."""
        if self._prefix:
            data, ends = _with_spaces(data, ends, continues)
        offsets = self._word_offsets(data, ends)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
        words = pa.Array.from_buffers(pa.binary(), len(offsets) - 1, buffers).dictionary_encode()
        slots = self._slots(words.dictionary.to_pylist())
        index = words.indices.to_numpy()
        counts = self._counts[slots][index]
        token_ends = np.concatenate([[0], np.cumsum(counts)])
        shift = self._starts[slots][index] - token_ends[:-1]  # index in the cache - index in the output
        tokens = self._tokens[np.repeat(shift, counts) + np.arange(token_ends[-1])]
        return tokens, np.diff(token_ends[np.searchsorted(offsets, ends)], prepend=0)

    def _word_offsets(self, data: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Where words start, and the end of the last one: int32 (words + 1,)."""
        is_start = np.empty(len(data) + 1, dtype=bool)  # of a word, at byte i
        pairs = np.ndarray((max(len(data) - 1, 0),), "<u2", buffer=data, strides=(1,))
        for start in range(0, len(pairs), BLOCK_BYTES):
            block = pairs[start : start + BLOCK_BYTES]
            out = is_start[start + 1 : start + 1 + len(block)]
            np.take(self._boundaries, block, out=out, mode="clip")  # mode "raise" would copy
        for position in _find_symbol(SPACE.encode(), data):
            is_start[[position, position + 3]] = False
        is_start[0] = True
        is_start[ends] = True
        return np.flatnonzero(is_start).astype(np.int32)

    def _slots(self, words: list[bytes]) -> np.ndarray:
        """The cache slots of distinct words; new words are encoded."""
        if len(self._slot_of) > MAX_WORDS or self._starts[self._num_cached] > MAX_TOKENS:
            self._clear()
        slots = np.fromiter(map(self._slot_of.get, words, repeat(-1)), np.int64, len(words))
        missing = np.flatnonzero(slots < 0).tolist()
        if missing:
            missing.sort(key=lambda i: len(words[i]))  # words that are too long to be cached come last
            new = [words[i] for i in missing]
            slots[missing] = np.arange(self._num_cached, self._num_cached + len(new))
            self._store(new)
        return slots

    def _store(self, words: list[bytes]) -> None:
        """Encode `words`, sorted by length, into the slots from `_num_cached` on."""
        ids = list(self._encode_words(words))
        counts = np.fromiter(map(len, ids), np.int64, len(ids))
        slot, first = self._num_cached, int(self._starts[self._num_cached])
        starts = first + np.cumsum(counts)
        self._tokens = _grown(self._tokens, int(starts[-1]))
        self._counts, self._starts = _grown(self._counts, slot + len(ids)), _grown(self._starts, slot + len(ids) + 1)
        self._tokens[first : starts[-1]] = np.fromiter(chain.from_iterable(ids), np.int32, int(counts.sum()))
        self._counts[slot : slot + len(ids)] = counts
        self._starts[slot + 1 : slot + 1 + len(ids)] = starts
        num_short = bisect_right(words, MAX_WORD_BYTES, key=len)
        self._slot_of.update(zip(words[:num_short], range(slot, slot + num_short), strict=True))
        self._num_cached += num_short

    def _clear(self) -> None:
        self._slot_of: dict[bytes, int] = {}
        self._num_cached = 0
        self._tokens = np.zeros(0, dtype=np.int32)  # of all words
        self._starts = np.zeros(1, dtype=np.int64)  # of each slot's tokens in _tokens
        self._counts = np.zeros(0, dtype=np.int64)  # of each slot's tokens


def parse_sentencepiece(content: bytes) -> Any:
    """The ModelProto of a model file: pieces, trainer_spec, normalizer_spec."""
    return vars(sentencepiece_model_pb2)["ModelProto"].FromString(content)  # created on import, unknown to pyright


def sentencepiece_boundaries(model: Any) -> np.ndarray | None:
    """`boundaries` for a SentencePiece model; None if its words cannot be cached (module docstring)."""
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    keeps_text = normalizer.escape_whitespaces and not normalizer.precompiled_charsmap
    keeps_text = keeps_text and not normalizer.remove_extra_whitespaces and not trainer.treat_whitespace_as_suffix
    only_merges = all(piece.type not in (kinds.USER_DEFINED, kinds.UNUSED) for piece in model.pieces)
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback or not keeps_text or not only_merges:
        return None
    pieces = [piece.piece for piece in model.pieces if piece.type == kinds.NORMAL]
    # "\0" joins the pieces: it is in none, and fewer boundaries are always correct.
    text = np.frombuffer("\0".join(pieces).replace(SPACE, " ").encode(), dtype=np.uint8).astype(np.int64)
    boundaries = np.ones(1 << 16, dtype=bool)
    boundaries[text[:-1] + 256 * text[1:]] = False
    return boundaries & ~np.repeat(np.arange(256) & 0xC0 == 0x80, 256)  # never inside a character


def huggingface_boundaries(spec: dict[str, Any]) -> np.ndarray | None:
    """The same for a tokenizer.json."""
    model, split = spec["model"], spec["pre_tokenizer"] or {}
    if model.get("type") != "BPE" or model.get("dropout") or spec["normalizer"] is not None:
        return None
    if not all(token["special"] for token in spec["added_tokens"]):  # others are matched in the text before BPE runs
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
    boundaries = np.zeros((256, 256), dtype=bool)  # [second, first]
    boundaries |= np.outer(ASCII & ~LETTERS, LETTERS) | np.outer(ASCII & ~DIGITS, DIGITS)
    boundaries[ord(" ")] |= VISIBLE
    return boundaries.reshape(-1)


def _with_spaces(data: np.ndarray, ends: np.ndarray, continues: bool) -> tuple[np.ndarray, np.ndarray]:
    """Put a space before each non-empty document, except a first one that continues a document."""
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


def _find_symbol(symbol: bytes, data: np.ndarray) -> Iterator[int]:
    """The positions of the three bytes of `symbol`."""
    if (data == symbol[1]).any():  # rare in most languages, and this test is ten times as fast as the search
        text = data.tobytes()
        position = text.find(symbol)
        while position >= 0:
            yield position
            position = text.find(symbol, position + 1)


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """`array` with space for at least `size` elements; its length doubles, so growth is cheap on average."""
    if size <= len(array):
        return array
    grown = np.zeros(max(size, 2 * len(array), 1 << 16), dtype=array.dtype)
    grown[: len(array)] = array
    return grown
