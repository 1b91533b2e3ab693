"""Convert one part of token files: read its documents, filter them, and pack them into shards.

Documents are held out by a hash of their tokens, which does not depend on the format or dtype that they come from.

Decisions: DATA-24.
"""

import numpy as np

from mythos_dist.prepare.heldout import is_heldout, text_digest
from mythos_dist.prepare.part import OUTCOMES
from mythos_dist.prepare.part_converter import EMPTY, SHORT, WRITTEN, PartConverter
from mythos_dist.prepare.tokens.documents import LONG_TOKENS, Documents, read_token_documents


class TokenPartConverter(PartConverter):
    """Converts the documents of one part and counts the outcomes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._open = ""  # the split of a long document whose end has not been read

    def _add_all(self) -> None:
        job, rules = self._job, self._job.columns.tokens
        assert rules is not None
        for span in self._part.spans:
            for item in read_token_documents(span, rules, job.eos_id, job.vocab_size):
                if self._tokens_left() <= 0 and not self._open:
                    return
                self._add_progress(item.size, len(item.tokens))
                self._add_documents(item)

    def _add_documents(self, item: Documents) -> None:
        self._record.tokens_read += len(item.tokens) + int(item.had_eos.sum())
        if not len(item.ends):
            self._open = self._open or self._split_of(item.tokens)
            self._write(self._open, item.tokens, None)
            return
        if self._open:
            item = self._close(item)
        self._add_complete(item)

    def _close(self, item: Documents) -> Documents:
        """Write the last piece of a long document; returns the other documents of `item`."""
        end, split = int(item.ends[0]), self._open
        self._write(split, item.tokens[:end], np.array([end]))
        self._record.documents_in[split] += 1
        self._record.documents[OUTCOMES[WRITTEN]] += 1
        self._record.eos_read += int(item.had_eos[0])
        self._open = ""
        return Documents(item.tokens[end:], item.ends[1:] - end, item.had_eos[1:], item.size)

    def _add_complete(self, item: Documents) -> None:
        """Filter documents, and append them to their splits."""
        record, counts = self._record, np.diff(item.ends, prepend=0)
        outcomes = np.where(counts > 0, WRITTEN, EMPTY)
        outcomes[(counts > 0) & (counts < (self._job.filters.min_tokens or 0))] = SHORT
        chosen = np.flatnonzero(outcomes == WRITTEN)
        kept = len(outcomes)
        if self._tokens_left() <= 0:  # a long document has just reached the limit
            kept, chosen = 0, chosen[:0]
        elif (last := self._last_until_limit(counts[chosen])) < len(chosen):
            kept, chosen = int(chosen[last]) + 1, chosen[: last + 1]
        outcomes, not_read = outcomes[:kept], counts[kept:]
        record.tokens_read -= int(not_read.sum() + item.had_eos[kept:].sum())
        record.eos_read += int(item.had_eos[:kept].sum())
        record.tokens_left_out += int(counts[:kept][outcomes == SHORT].sum())
        self._count(outcomes)
        is_chosen = np.zeros(len(counts), bool)
        is_chosen[chosen] = True
        heldout = np.zeros(len(chosen), bool)
        if self._job.heldout:
            ends = item.ends[chosen].tolist()
            texts = zip((item.ends - counts)[chosen].tolist(), ends, strict=True)
            heldout = np.array([self._split_of(item.tokens[a:b]) == "heldout" for a, b in texts], bool)
        self._write_documents(item.tokens[np.repeat(is_chosen, counts)], counts[chosen], heldout)

    def _split_of(self, tokens: np.ndarray) -> str:
        """The split of a document that begins with `tokens`, all of them or at least LONG_TOKENS."""
        heldout = self._job.heldout
        if heldout and is_heldout(text_digest(tokens[:LONG_TOKENS].astype("<u4").data), heldout):
            return "heldout"
        return "train"
