"""Rows of a batch at different loops (continuous depth batching): one pass of the looped block serves them all.

Each row holds one token, at its own position of its own sequence. A row enters at loop 0 while others are in the
middle, and leaves after its last loop or the loop at which its exit criterion holds; so no row waits for the slowest.
Where all rows are at the same loop, loop index and cache entry are one for the batch, and nothing is gathered.

An exited token has no keys for the loops it did not run: they get copies of its last entry, as in Huginn. With one
entry for all loops (cache=last) there is nothing to copy.

Decisions: DECODE-5, DECODE-6.
"""

# B rows, D model, V vocabulary.

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mythos_dist.generate.exits import exit_threshold, kl_divergence, latent_change
from mythos_dist.generate.sampling import Sampling
from mythos_dist.model.activations import UNSET, Activations
from mythos_dist.model.attention import PassContext
from mythos_dist.model.decode import enter, logits_of
from mythos_dist.model.kv_cache import KVCache, looped_layer
from mythos_dist.model.mythos import Mythos
from mythos_dist.model.recurrence import LoopInputs

_ROW_FIELDS = ("h", "e", "output", "cum_halting", "kv")  # of Activations; kv: with model.kv_sharing


@dataclass
class RowLoops:
    """Where a row's token is in the loops."""

    n_loops: int  # at most
    sampling: Sampling
    index: int | None = None  # the next loop; None: the row has no token in the loops
    logits: Tensor | None = field(default=None, repr=False)  # (V,) after the last loop, with exit=kl


class DepthBatch:
    """The tokens in the loops, by cache row. Row i of everything here is row i of the cache."""

    def __init__(self, model: Mythos, cache: KVCache):
        self._model, self._cache = model, cache
        self.rows: list[RowLoops] = []
        # (rows, 1, ...): the fields of Activations that are set, and "injected"; of rows that have entered before.
        self._state: dict[str, Tensor] = {}
        self._inputs: LoopInputs | None = None
        self._aux_loss: Tensor = UNSET
        self._context: tuple[object, PassContext] | None = None

    def enter(self, rows: Sequence[int], tokens: Sequence[int], seeds: Sequence[int]) -> None:
        """Start the loops of a new token for each of `rows`."""
        ids = torch.tensor(tokens, device=self._model.embed.weight.device).unsqueeze(1)
        row_seeds = torch.tensor(seeds, device=ids.device)
        activations = enter(self._model, ids, self._context_of(rows), row_seeds)
        self._inputs, self._aux_loss = self._model.recurrent.inputs(activations.e), activations.aux_loss
        fields = {name: getattr(activations, name) for name in _ROW_FIELDS} | {"injected": self._inputs.injected}
        state = {name: values for name, values in fields.items() if values is not None}
        if len(rows) < len(self.rows):
            state = {name: _with_rows(self._state[name], rows, new, len(self.rows)) for name, new in state.items()}
        self._state = state
        for row in rows:
            self.rows[row].index, self.rows[row].logits = 0, None

    def advance(self) -> list[tuple[int, Tensor]]:
        """Run one loop of all rows: those that are done, with their outputs (1, D) after the loops."""
        B, state = len(self.rows), dict(self._state)
        own = [row.index for row in self.rows if row.index is not None]
        assert self._inputs is not None and len(own) == len(state["h"]) == B
        index = own[0] if len(set(own)) == 1 else torch.tensor(own, device=state["h"].device)
        inputs = self._inputs._replace(injected=state.pop("injected"))
        before = Activations(**state, aux_loss=self._aux_loss)
        context = self._context_of(range(B))
        after = self._model.recurrent.advance(before, inputs, index, context)
        final = self._model.recurrent.act.final(before, after)
        exits = self._exits(before, after, final)
        self._state.update({name: getattr(after, name) for name in state})
        done = []
        for i, row in enumerate(self.rows):
            assert row.index is not None
            row.index += 1
            if exits[i] or row.index == row.n_loops:
                done.append((i, final[i]))
        return done

    def leave(self, done: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, list[int]]:
        """The logits (rows, V) of rows that are done, fp32, and the loops of each. Their tokens are cached."""
        rows = [i for i, _ in done]
        logits = self._logits(rows, torch.stack([output for _, output in done]))
        loops = []
        lengths = self._cache.lengths
        for i in rows:
            row = self.rows[i]
            assert row.index is not None
            if row.index < row.n_loops:
                self._repeat_last_entry(i, row.index - 1, row.n_loops, lengths[i])
            loops.append(row.index)
            row.index = None
            lengths[i] += 1
        self._cache.lengths = lengths
        return logits, loops

    def remove(self, row: int) -> None:
        """Free a row; the last row takes its place."""
        last = len(self.rows) - 1
        lengths = self._cache.lengths
        if row != last:
            self._cache.move_row(last, row, new_tokens=1)  # its token may be in the middle of the loops
            lengths[row] = lengths[last]
        kept = [last if i == row else i for i in range(last)]
        self._state = {name: values[kept] if len(values) > last else values for name, values in self._state.items()}
        lengths[last] = 0
        self._cache.lengths = lengths
        self.rows[row] = self.rows[last]
        self.rows.pop()

    def _context_of(self, rows: Sequence[int]) -> PassContext:
        lengths = self._cache.lengths
        key = tuple((row, lengths[row]) for row in rows)
        if self._context is None or self._context[0] != key:
            ids = torch.empty(len(rows), 1, device=self._model.embed.weight.device)
            context = self._model.context(ids, cache=self._cache.select(rows))
            self._context = key, replace(context, counts_experts=False)
        return self._context[1]

    def _logits(self, rows: Sequence[int], outputs: Tensor) -> Tensor:
        return logits_of(self._model, outputs, self._context_of(rows))[:, -1]

    def _exits(self, before: Activations, after: Activations, final: Tensor) -> list[bool]:
        """Whether the criterion of each row holds. No token exits before its second loop by latent or kl."""
        kinds = {row.sampling.exit for row in self.rows}
        exits = [False] * len(self.rows)
        change = latent_change(after.h[:, -1], before.h[:, -1]).tolist() if "latent" in kinds else []
        cum_halting = after.cum_halting[:, -1].tolist() if "halting" in kinds else []
        compared = [i for i, row in enumerate(self.rows) if row.sampling.exit == "kl"]
        logits = self._logits(compared, final[compared]) if compared else None
        for i, row in enumerate(self.rows):
            if row.sampling.exit is None:
                continue
            threshold = exit_threshold(row.sampling, self._model.config)
            if row.sampling.exit == "halting":
                exits[i] = cum_halting[i] >= threshold
            elif row.sampling.exit == "latent":
                exits[i] = row.index != 0 and change[i] < threshold
            else:
                assert logits is not None
                new = logits[compared.index(i)]
                exits[i] = row.logits is not None and float(kl_divergence(new, row.logits)) < threshold
                row.logits = new
        return exits

    def _repeat_last_entry(self, row: int, last_loop: int, n_loops: int, position: int) -> None:
        groups = [t // self._model.config.kv_loops * self._model.config.kv_loops for t in range(last_loop, n_loops)]
        for layer in map(looped_layer, range(self._model.config.loop_layers)):
            source, *targets = (self._cache.loop_key(layer, t) for t in groups)
            self._cache.repeat_entry(source, targets, row, position)


def _with_rows(values: Tensor, rows: Sequence[int], new: Tensor, total: int) -> Tensor:
    """values (n, ...) with `new` in `rows`: (total, ...), n <= total."""
    values = torch.cat([values, values.new_zeros(total - len(values), *values.shape[1:])])
    values[list(rows)] = new
    return values
