"""Convert one part of conversations: read, filter, tokenize, and pack them into shards with a loss mask."""

import numpy as np

from mythos_dist.data.loss_mask import IN_LOSS
from mythos_dist.data.manifest import SPLITS
from mythos_dist.prepare.batches import Batch, LongDocument, starts_of, valid_utf8
from mythos_dist.prepare.conversations import fit, tokens_and_flags
from mythos_dist.prepare.heldout import is_heldout, text_digest
from mythos_dist.prepare.packing import WindowPacker
from mythos_dist.prepare.part import OUTCOMES
from mythos_dist.prepare.part_converter import NOT_IN_LOSS, SHORT, WRITTEN, PartConverter, to_dtype


class ChatPartConverter(PartConverter):
    """Converts the conversations of one part and counts the outcomes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        job = self._job
        self._packers = {split: WindowPacker(self._writers[split], job.seq_len, job.eos_id) for split in SPLITS}

    def _add_batch(self, batch: Batch) -> None:
        outcomes, starts, text = self._filter(batch), starts_of(batch.ends), batch.data.data
        for i, outcome in enumerate(outcomes.tolist()):
            if self._tokens_left() <= 0:
                return
            self._add_conversation(bytes(text[starts[i] : batch.ends[i]]), outcome)
            self._record.repaired += int(batch.repaired[i])

    def _add_long(self, document: LongDocument) -> None:
        pieces = list(valid_utf8(document.pieces()))
        self._record.repaired += any(repaired for _, repaired in pieces)
        self._add_conversation(b"".join(piece.tobytes() for piece, _ in pieces), self._filter_long(document))

    def _add_conversation(self, text: bytes, outcome: int) -> None:
        if outcome == WRITTEN:
            outcome = self._write_conversation(text)
        self._record.documents[OUTCOMES[outcome]] += 1

    def _write_conversation(self, text: bytes) -> int:
        """Append a conversation to its split; its outcome: WRITTEN, SHORT or NOT_IN_LOSS."""
        job, record = self._job, self._record
        tokens, flags = tokens_and_flags(text, self._tokenizer)
        self._add_progress(len(text), len(tokens))
        if len(tokens) < (job.filters.min_tokens or 0):
            return SHORT
        kept = fit(flags, job.seq_len + 1)
        if not kept:
            return NOT_IN_LOSS
        record.truncated += kept < len(tokens)
        tokens, flags = tokens[:kept], flags[:kept]
        split = "heldout" if job.heldout and is_heldout(text_digest(text), job.heldout) else "train"
        self._packers[split].add(np.stack([to_dtype(tokens, job.vocab_size, job.dtype), flags.astype(job.dtype)]))
        record.documents_in[split] += 1
        record.tokens[split] += kept
        record.learnt[split] += int(np.count_nonzero(flags & IN_LOSS))
        if self._unk_id is not None:
            record.unknown += int(np.count_nonzero(tokens == self._unk_id))
        return WRITTEN

    def _tail(self, split: str) -> np.ndarray:
        tail = self._packers[split].take_open().ravel()
        assert not len(super()._tail(split)), "a packer writes complete windows"
        return tail
