"""Log-probabilities of a prompt's tokens, which `echo` with `logprobs` returns: evaluation by likelihood needs them.

Decisions: SERVE-6.
"""

import math
from collections.abc import Sequence

import torch

from mythos_dist.generate.sampling import TokenLogprob
from mythos_dist.model.kv_cache import KVCache
from mythos_dist.model.mythos import Mythos

CHUNK = 512  # tokens: the logits of a long prompt over a large vocabulary would not fit into memory


@torch.no_grad()
def score(model: Mythos, prompt: Sequence[int], n_loops: int, top: int) -> list[TokenLogprob]:
    """An entry per token of `prompt`, with `top` alternatives; natural logarithms, computed in fp32.

    That of the first token is NaN: nothing precedes it.
    """
    ids = torch.tensor(prompt).unsqueeze(0)
    scored, cache = [TokenLogprob(prompt[0], math.nan, [])], KVCache()
    for chunk in ids.split(CHUNK, dim=1):
        first = len(scored)
        logprobs = model(chunk, n_loops, cache=cache)[0].float().log_softmax(-1)  # (S, V)
        following = ids[0, first : first + len(logprobs)]
        logprobs = logprobs[: len(following)]  # nothing follows the prompt's last token
        values = logprobs.gather(-1, following.unsqueeze(-1))[:, 0].tolist()
        best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        for token, value, tops, ranks in zip(
            following.tolist(), values, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            scored.append(TokenLogprob(token, value, list(zip(ranks, tops, strict=True))))
    return scored
