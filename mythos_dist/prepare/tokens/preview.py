"""What a source begins with, for the console: a wrong tokenizer or a wrong rule for documents shows at once."""

import numpy as np

from mythos_dist.data.manifest import TokenRules
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.prepare.inputs import reading
from mythos_dist.prepare.spans import Chunks
from mythos_dist.prepare.tokens.documents import read_token_documents
from mythos_dist.prepare.tokens.files import ends_at_rows, open_rows

SHOWN_SOURCES, SHOWN_TOKENS = 3, 24
MIN_EQUAL_ROWS = 8


def preview_lines(chunks: list[Chunks], rules: TokenRules, tokenizer: Tokenizer) -> list[str]:
    """The text that the first sources begin with, and a note if their rows look like windows of a stream.

    Raises UserError for a token id outside the vocabulary.
    """
    lines = []
    for one in [one for one in chunks if len(one.sizes)][:SHOWN_SOURCES]:
        documents = read_token_documents(one.span(0, 1), rules, tokenizer.eos_id, tokenizer.vocab_size)
        text = tokenizer.decode(next((item.tokens[:SHOWN_TOKENS] for item in documents if len(item.tokens)), []))
        lines.append(f"{one.source.name} begins with {text!r}")
        if ends_at_rows(one.source, rules) and (length := _equal_length(one, rules, tokenizer.eos_id)):
            lines.append(
                f"note: {one.source.name} begins with rows of {length:,} tokens each, which become documents; if they "
                "are windows of one stream, set --documents eos"
            )
    return lines


def _equal_length(chunks: Chunks, rules: TokenRules, eos_id: int) -> int:
    """The length of the first rows if it is the same for all and they do not end with EOS; else 0."""
    with reading(chunks.source):
        block = next(open_rows(chunks.source, rules).blocks(0, int(chunks.edges[1])), None)
    if block is None or len(block.ends) < MIN_EQUAL_ROWS:
        return 0
    lengths = np.diff(block.ends, prepend=0)
    if (lengths != lengths[0]).any() or not lengths[0] or (block.tokens[block.ends - 1] == eos_id).all():
        return 0
    return int(lengths[0])
