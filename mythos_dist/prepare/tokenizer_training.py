"""Train a SentencePiece tokenizer on text: one whose `decode(encode(text))` is the text (`data/tokenizer.py`).

The same texts give the same bytes, on every machine.
"""

import io
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece as spm

from mythos_dist.data.tokenizer import Tokenizer, sentencepiece_reason
from mythos_dist.errors import UserError
from mythos_dist.files import make_folders, write_atomically

MAX_LINE_CHARS = 4096  # per training line, so at most 4 * 4096 bytes for SentencePiece; longer lines are split
MAX_TRAIN_LINES = 2_000_000  # about 1 GB of text: the unigram trainer holds everything in memory
TRAIN_THREADS = 16  # fixed: with another number of threads, sums round differently and the model changes


def train_tokenizer(
    texts: Iterable[str], out: Path, vocab_size: int, model_type: str = "unigram", seed: int = 0
) -> Tokenizer:
    """Train a SentencePiece model of `vocab_size` pieces on `texts` and write it to `out`.

    Beyond MAX_TRAIN_LINES lines, a random sample is drawn with `seed`.
    Raises UserError if `vocab_size` is impossible for the texts.

    >>> from pathlib import Path
    >>> from mythos_dist import train_tokenizer
    >>> train_tokenizer(["a text and a text"] * 100, Path("tokenizer.model"), vocab_size=266).vocab_size
    266
    """
    return train_on_lines(sample_lines(texts, seed), out, vocab_size, model_type)


def train_on_lines(lines: list[str], out: Path, vocab_size: int, model_type: str) -> Tokenizer:
    """`train_tokenizer` on lines from `sample_lines`."""
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
        raise UserError(_vocab_problem(vocab_size, sentencepiece_reason(error))) from None
    make_folders(out.parent)
    write_atomically(out, model.getvalue())
    return Tokenizer.load(out)


def sample_lines(texts: Iterable[str], seed: int) -> list[str]:
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


def _vocab_problem(vocab_size: int, reason: str) -> str:
    if match := re.search(r"too high .*<= (\d+)", reason):
        return f"vocab_size={vocab_size} is too large for this text; set it to at most {match[1]}, or give more text"
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        return (
            f"vocab_size={vocab_size} is too small for the characters of this text and the 256 byte pieces; "
            f"set it to more than {match[1]}"
        )
    return f"SentencePiece could not train a model of vocab_size={vocab_size} on this text: {reason}"
