"""Work in chunks: layers that treat each token alone run over `train.chunk_tokens` tokens at a time, also backward.

y = cat(f(x_1), f(x_2), ...). A chunk saves its inputs only, and its backward pass computes f again. So the tensors
inside f, such as the hidden rows of FFNs and experts, are as large as a chunk, however long the sequence is.
The trap: f holds collectives. The number of chunks follows from shapes, which are equal on every rank, never from data.

Decisions: MODEL-18.
"""

# B batch, S' tokens of each sequence on this rank (S / tensor with sequence parallelism, else S), N' = B * S'.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mythos_dist.parallel.context import most_local_tokens
from mythos_dist.parallel.mesh import SINGLE, Mesh


@dataclass(frozen=True)
class TokenChunks:
    """How the tokens of a rank are divided. tokens: of a chunk, on all ranks of the tensor axis; 0: no division."""

    tokens: int = 0
    mesh: Mesh = SINGLE

    @property
    def local_tokens(self) -> int:
        """Tokens of a chunk on this rank."""
        return max(1, self.tokens // self.mesh.tensor.size) if self.mesh.sequence else self.tokens

    def split(self, *tensors: Tensor, seq_len: int | None = None) -> list[tuple[Tensor, ...]]:
        """Tensors (B, S', ...) -> their chunks (1, n, ...) together, of equal sizes up to one token; as they are, if
        they are one chunk.

        seq_len: of the full sequences, of which context ranks may have a token more or fewer: all get as many chunks as
        the rank with most tokens. For work with collectives over other ranks than those of the tensor axis.
        """
        B, tokens = tensors[0].shape[:2]
        if seq_len is not None:
            tokens = most_local_tokens(seq_len, self.mesh)
        count = -(-B * tokens // self.local_tokens) if self.tokens else 1
        if count <= 1:
            return [tensors]
        rows = [x.flatten(0, 1).unsqueeze(0) for x in tensors]
        each, more = divmod(rows[0].shape[1], count)
        sizes = [each + 1] * more + [each] * (count - more)
        # Not `tensor_split`, whose chunks are slices: each would have a gradient as large as all of x.
        return list(zip(*(x.split(sizes, dim=1) for x in rows), strict=True))

    def recompute(self, function: Callable, x: Tensor, *others: Any) -> Any:
        """`function(x, *others)`, recomputed in the backward pass if the layer runs in chunks. Not for dropout: a
        recomputation draws other random numbers."""
        if self.tokens and torch.is_grad_enabled():
            return checkpoint(function, x, *others, use_reentrant=False, preserve_rng_state=False)
        return function(x, *others)


def concatenate(chunks: list[Tensor], like: Tensor) -> Tensor:
    """The chunks (1, n, D), or the one tensor, as (B, S', D)."""
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1).view(*like.shape[:2], -1)
