"""The key-value cache of decoding: one buffer per layer and loop, with rows of different lengths.

A row's new tokens are written after its own `length` tokens, and a query sees the keys up to its own position. So what
a buffer holds beyond a row's length is never seen, and lowering the length forgets tokens.
The trap: unseen entries are multiplied by a probability of 0, so they must be finite; buffers start as zeros.

Modes: `all` keeps the entries of every loop (exact), `last` one entry for all loops, `every:k` one for k loops in a
row. Loops that share a buffer overwrite the entries of the new tokens, so earlier tokens have those of the group's
last loop (Huginn, Geiping et al. 2025): an approximation of a model that was trained without `model.kv_sharing`.

Decisions: DECODE-1, DECODE-2.
"""

# B rows of a pass, S new tokens, T longest row (cached and new), C elements per token.

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mythos_dist.config.schema import MAX_LOOPS, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.model.attention_sizes import attention_sizes

CacheKey = str | Sequence[str]  # of a layer and loop; a key for each row where rows are at different loops


def looped_layer(index: int) -> str:
    """The name of a layer of the looped block, for `KVCache.loop_key`."""
    return "recurrent" if index == 0 else f"recurrent.{index}"


def loops_per_entry(mode: str) -> int:
    """How many loops in a row share a cache entry in `mode`. Raises UserError for an unknown mode."""
    if mode == "all":
        return 1
    if mode == "last":
        return MAX_LOOPS
    match = re.fullmatch(r"every:(\d{1,3})", mode)
    if match and 1 <= int(match[1]) <= MAX_LOOPS:
        return int(match[1])
    raise UserError(f"cache={mode!r} is unknown; use all, last, or every:K with K from 1 to {MAX_LOOPS}")


class KVCache:
    """Keys and values (GQA) or latents and rotary keys (MLA) of every layer and loop, for the rows of a batch.

    A layer appends the values of its new tokens and reads those of all tokens; a full buffer doubles in size. The model
    calls `start_pass` before its layers and `advance` after them.

    >>> import torch
    >>> from mythos_dist import KVCache, Mythos
    >>> model, cache = Mythos.from_pretrained("exported"), KVCache()
    >>> with torch.inference_mode():
    ...     prompt = model(torch.tensor([[1, 2, 3]]), cache=cache)
    ...     following = model(torch.tensor([[4]]), cache=cache)
    >>> following.shape[1], cache.lengths
    (1, [4])
    """

    def __init__(self, rows: int | None = None, mode: str = "all") -> None:
        """rows: None, as many as the first pass has. Raises UserError for an unknown mode."""
        self._loops_per_entry = loops_per_entry(mode)
        self._lengths: list[int] | None = None if rows is None else [0] * rows  # of all rows, shared by selections
        self._buffers: dict[str, Tensor] = {}  # (all rows, capacity, C)
        self._rows: Sequence[int] | None = None  # None: all
        self._ragged: tuple[Tensor, Tensor] | None = None  # of this pass: row (B, 1) and position (B, S)

    @property
    def lengths(self) -> list[int]:
        """The cached tokens of each row."""
        if self._lengths is None or self._rows is None:
            return list(self._lengths or [])
        return [self._lengths[row] for row in self._rows]

    @lengths.setter
    def lengths(self, lengths: Sequence[int]) -> None:
        """Forget the last tokens of rows, such as padding or rejected drafts."""
        assert len(lengths) == len(self.lengths)
        for row, length in zip(self._rows or range(len(lengths)), lengths, strict=True):
            self._lengths[row] = length  # type: ignore[index]

    @property
    def tokens(self) -> int:
        """The cached tokens of the longest row."""
        return max(self.lengths, default=0)

    def select(self, rows: Sequence[int]) -> "KVCache":
        """The cache of `rows`, sharing buffers and lengths: without copies if they follow each other.
        Needs `rows` or a first pass."""
        assert self._lengths is not None and self._rows is None
        following = range(rows[0], rows[0] + len(rows))
        selected = KVCache()
        selected._loops_per_entry, selected._lengths = self._loops_per_entry, self._lengths
        selected._buffers, selected._rows = self._buffers, following if list(rows) == list(following) else list(rows)
        return selected

    def move_row(self, source: int, target: int, new_tokens: int = 0) -> None:
        """Copy row `source` over row `target`, with entries of `new_tokens` tokens that some layers have appended."""
        assert self._lengths is not None and self._rows is None
        length = self._lengths[target] = self._lengths[source]
        for buffer in self._buffers.values():
            buffer[target, : length + new_tokens] = buffer[source, : length + new_tokens]

    def loop_key(self, layer: str, t: int) -> str:
        """The key of loop t of a looped layer."""
        return f"{layer}.{t // self._loops_per_entry}"

    def start_pass(self, batch: int, new_tokens: int, device: torch.device) -> Tensor | None:
        """Begin a pass of `new_tokens` tokens for each row: positions (B, S) int64, or None if all rows have the same
        length and continue at `tokens`."""
        if self._lengths is None:
            self._lengths = [0] * batch
        lengths = self.lengths
        assert len(lengths) == batch, f"{batch} rows, and the cache has {len(lengths)}"
        self._ragged = None
        if len(set(lengths)) <= 1:
            return None
        positions = torch.tensor(lengths, device=device).unsqueeze(1) + torch.arange(new_tokens, device=device)
        self._ragged = torch.arange(batch, device=device).unsqueeze(1), positions
        return positions

    def append(self, key: CacheKey, new: Tensor) -> Tensor:
        """Append `new` (B, S, C) to each row of this pass; all tokens (B, T, C), valid up to each row's length + S."""
        end = self.tokens + new.shape[1]
        if not isinstance(key, str) or isinstance(self._rows, list):
            return self._append_by_row([key] * len(new) if isinstance(key, str) else key, new, end)
        rows = self._selected(self._reserve(key, new, end))
        if self._ragged is None:
            rows[:, end - new.shape[1] : end] = new
        else:
            rows[self._ragged] = new
        return rows[:, :end]

    def read(self, key: str, new_tokens: int) -> Tensor:
        """All tokens (B, T, C), after this pass has appended its `new_tokens`."""
        return self._selected(self._buffers[key])[:, : self.tokens + new_tokens]

    def advance(self, new_tokens: int) -> None:
        """End a pass of `new_tokens` tokens for each row."""
        self.lengths = [length + new_tokens for length in self.lengths]

    def repeat_entry(self, source: str, targets: Sequence[str], row: int, position: int) -> None:
        """Copy the entry of one token, such as from the loop at which it exited to the loops that it did not run."""
        assert self._rows is None
        entry = self._buffers[source][row, position]
        for key in dict.fromkeys(targets):
            if key != source:
                self._reserve(key, self._buffers[source][:1, :1], position + 1)[row, position] = entry

    def _selected(self, buffer: Tensor) -> Tensor:
        """The rows of this cache in a buffer: a view, or a copy where they do not follow each other."""
        if isinstance(self._rows, range) and len(self._rows) < len(buffer):
            return buffer[self._rows.start : self._rows.stop]
        return buffer[self._rows] if isinstance(self._rows, list) else buffer

    def _append_by_row(self, keys: Sequence[str], new: Tensor, end: int) -> Tensor:
        """Rows at different loops have different buffers, so their entries are copied into one tensor."""
        out, rows = new.new_zeros(new.shape[0], end, new.shape[2]), self._rows or range(len(new))
        for i, (key, number, length) in enumerate(zip(keys, rows, self.lengths, strict=True)):
            row, stop = self._reserve(key, new, end)[number], length + new.shape[1]
            row[length:stop] = new[i]
            out[i, :stop] = row[:stop]
        return out

    def _reserve(self, key: str, like: Tensor, end: int) -> Tensor:
        """The buffer of `key`, with room for `end` tokens: (all rows, capacity, C)."""
        assert self._lengths is not None
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape[1] < end:
            held = 0 if buffer is None else buffer.shape[1]
            grown = like.new_zeros(len(self._lengths), max(end, 2 * held), *like.shape[2:])
            if buffer is not None:
                grown[:, :held] = buffer
            self._buffers[key] = buffer = grown
        return buffer


def cache_bytes_per_token(config: MythosConfig, n_loops: int, mode: str = "all", element_bytes: int = 2) -> int:
    """Bytes of the cache per token of a sequence, on one rank without tensor parallelism."""
    first_loops = {t // config.kv_loops * config.kv_loops for t in range(n_loops)}  # those that compute keys and values
    shared = {t // loops_per_entry(mode) for t in first_loops}
    entries = config.prelude_layers + len(shared) * config.loop_layers + config.coda_layers
    return entries * attention_sizes(config).cached * element_bytes
