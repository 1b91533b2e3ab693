"""The parts of a forward pass, for decoding that decides after each loop whether a token needs another.

`enter`, then `Recurrent.advance` once per loop, then `logits_of`: together they are `Mythos.forward`. One process holds
the full model.
"""

# B rows, S new tokens of each, D model, V vocabulary.

from collections.abc import Sequence

import torch
from torch import Tensor

from mythos_dist.model.activations import Activations
from mythos_dist.model.attention import PassContext
from mythos_dist.model.kv_cache import KVCache
from mythos_dist.model.loops import Loops
from mythos_dist.model.mythos import Mythos


def enter(model: Mythos, input_ids: Tensor, context: PassContext, seeds: Tensor | None = None) -> Activations:
    """Embedding and prelude of input_ids (B, S): the activations before the first loop. seeds (B,): of random initial
    hidden states (`model.initial_state=random`)."""
    h = model.embed.lookup(input_ids)
    for i, block in model.prelude.items():
        h = block(h, context, f"prelude.{i}")
    return model.recurrent.start(h, Loops(1, seeds=seeds), context)


def logits_of(model: Mythos, h: Tensor, context: PassContext) -> Tensor:
    """Coda, norm and head of the loops' output (B, S, D): logits (B, S, V) in fp32."""
    for i, block in model.coda.items():
        h = block(h, context, f"coda.{i}")
    return model.head.logits(model.norm(h)).float()


def prefill(
    model: Mythos, input_ids: Tensor, n_loops: int, cache: KVCache, chunk: int, seeds: Sequence[int] | None = None
) -> Tensor:
    """Read prompts (B, S), `chunk` tokens at a time, into `cache`: logits (B, V) after the last token, in fp32."""
    h = input_ids
    row_seeds = None if seeds is None else torch.tensor(seeds, device=input_ids.device)
    for part in input_ids.split(chunk, dim=1):
        loops = Loops(n_loops, seeds=row_seeds)
        h = model.run(Activations(part), range(n_loops), loops, model.context(part, cache=cache))[0].h
        cache.advance(part.shape[1])
    return model.head.logits(h[:, -1]).float()
