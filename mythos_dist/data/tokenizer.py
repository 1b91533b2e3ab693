"""A SentencePiece model file: text to token ids and back.

decode(encode(text)) == text for models trained here: identity normalisation, no dummy prefix, no whitespace removed,
bytes as fallback. EOS is a control piece, so no text can spell it: documents are told apart by EOS alone (pack.py).
The trap is U+2581: SentencePiece writes a space as that character, so a real one would come back as a space;
it is encoded as its three byte pieces instead.
"""

import hashlib
import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece as spm

from mythos_dist.errors import UserError

SPACE = "\u2581"  # what SentencePiece writes for a space
MAX_LINE_CHARS = 4096  # a training line in SentencePiece has at most 4 * this many bytes; longer text is cut
MAX_TRAIN_LINES = 2_000_000  # about 1 GB of text: the unigram trainer holds everything in memory
TRAIN_THREADS = 16  # fixed: sums in another number of threads round differently and give another model


class Tokenizer:
    """A loaded model; `path` is its file, `sha256` the hash of that file."""

    def __init__(self, path: Path, model: bytes):
        """`load` is the way in: it checks what is assumed here."""
        self.path = path
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._model = spm.SentencePieceProcessor(model_proto=model)
        self.vocab_size = int(self._model.get_piece_size())
        self.eos_id = int(self._model.eos_id())
        self._space_bytes = self._find_space_bytes()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Raises UserError if the file is missing, is no SentencePiece model, or has no EOS that text cannot spell."""
        path = Path(path)
        if not path.is_file():
            raise UserError("no such file; train a tokenizer with tools/train_tokenizer.py", str(path))
        model = path.read_bytes()
        try:
            if not model:  # SentencePiece takes an empty file for a model and complains on the console later
                raise RuntimeError("the file is empty")
            tokenizer = cls(path, model)
        except RuntimeError as error:
            raise UserError(f"not a SentencePiece model ({_reason(error)})", str(path)) from None
        if tokenizer.eos_id < 0:  # also where "</s>" is a user-defined piece, which text can spell
            problem = "the model has no EOS control piece, which documents are told apart by; train one that has it"
            raise UserError(problem, str(path))
        return tokenizer

    def encode(self, text: str) -> np.ndarray:
        """int32 of shape (tokens,), never containing `eos_id`; lone surrogates are read as "?"."""
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode("utf-8")  # SentencePiece raises on lone surrogates
            if self._space_bytes is not None and SPACE in text:
                return self._encode_around_spaces(text, self._space_bytes)
        return self._model.encode(text, out_type="numpy")

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """One int32 array per text, each as from `encode`."""
        return [self.encode(text) for text in texts]  # a batch call of SentencePiece measured no faster

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; control pieces such as EOS decode to nothing."""
        return self._model.decode(np.asarray(ids, dtype=np.int64).tolist())

    def _encode_around_spaces(self, text: str, space_bytes: np.ndarray) -> np.ndarray:
        first, *rest = (self._model.encode(part, out_type="numpy") for part in text.split(SPACE))
        return np.concatenate([first, *(ids for part in rest for ids in (space_bytes, part))])

    def _find_space_bytes(self) -> np.ndarray | None:
        """Ids of the byte pieces of U+2581, or None where cutting the text there would change the rest of it."""
        pieces = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
        ids = [self._model.piece_to_id(piece) for piece in pieces]
        first = self._model.encode("a", out_type=str) if self.vocab_size else []
        if not all(self._model.is_byte(i) for i in ids) or not first or first[0].startswith(SPACE):
            return None
        return np.array(ids, dtype=np.int32)


def train_tokenizer(
    texts: Iterable[str], out: Path, vocab_size: int, model_type: str = "unigram", seed: int = 0
) -> Tokenizer:
    """Train a SentencePiece model of `vocab_size` pieces on `texts` and write it to `out`.

    The same texts give the same bytes. Of more than MAX_TRAIN_LINES lines a random sample is used, drawn from `seed`.
    Unigram is the default: it encodes 4 to 5 times as fast as BPE. Raises UserError if `vocab_size` does not fit.
    """
    lines = _sample_lines(texts, seed)
    if not lines:
        raise UserError("no text to train a tokenizer on; check the input files")
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=4 * MAX_LINE_CHARS,
            num_threads=TRAIN_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_vocab_problem(vocab_size, _reason(error))) from None
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".tmp")
    unfinished.write_bytes(model.getvalue())
    os.replace(unfinished, out)
    return Tokenizer.load(out)


def _sample_lines(texts: Iterable[str], seed: int) -> list[str]:
    """A uniform sample of at most MAX_TRAIN_LINES lines, in one pass (Vitter's algorithm R)."""
    draw = random.Random(seed)
    lines: list[str] = []
    for seen, line in enumerate(_lines(texts)):
        if seen < MAX_TRAIN_LINES:
            lines.append(line)
        elif (slot := draw.randrange(seen + 1)) < MAX_TRAIN_LINES:
            lines[slot] = line
    return lines


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.encode("utf-8", "replace").decode("utf-8").split("\n"):
            for start in range(0, len(line), MAX_LINE_CHARS):
                yield line[start : start + MAX_LINE_CHARS]


def _reason(error: RuntimeError) -> str:
    """SentencePiece's message without its source line: 'INTERNAL: x.cc(1) [a <= b] Reason' -> 'Reason'."""
    return re.sub(r"^.*\.cc\(\d+\) \[.*\] ?", "", str(error)).removeprefix("INTERNAL: ").strip() or "not readable"


def _vocab_problem(vocab_size: int, reason: str) -> str:
    if match := re.search(r"too high .*<= (\d+)", reason):
        return f"vocab_size={vocab_size} is too large for this text; set it to at most {match[1]}, or give more text"
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        return (
            f"vocab_size={vocab_size} is too small for the characters of this text and the 256 byte pieces; "
            f"set it to more than {match[1]}"
        )
    return f"SentencePiece could not train a model of vocab_size={vocab_size} on this text: {reason}"
