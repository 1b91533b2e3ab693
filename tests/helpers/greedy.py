"""Greedy decoding by full forward passes."""

import torch

from mythos_dist.model import Mythos


@torch.no_grad()
def check_greedy(model: Mythos, prompt: list[int], tokens: list[int], new: int, n_loops: int) -> None:
    """The tokens are those that forward passes without a cache choose one after the other.

    One pass over prompt and tokens is enough: the first token that is not the choice after those before it differs.
    That logits of a position do not depend on later ones is proven in model/test_attention.py and
    model/test_generate.py.
    """
    assert len(tokens) == new
    logits = model(torch.tensor([[*prompt, *tokens[:-1]]]), n_loops)[0, len(prompt) - 1 :]
    assert tokens == logits.argmax(-1).tolist()
