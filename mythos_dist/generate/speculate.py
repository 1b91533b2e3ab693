"""Self-speculation: few loops draft tokens, and all loops verify them in one pass (Huginn, Geiping et al. 2025).

A draft is the model itself, ended early: its first loops are those of the full pass, so verification continues from
their hidden states and cache entries, and runs only the remaining loops, for all drafted tokens at once. It keeps the
drafts that greedy decoding would have chosen, and the first token that differs. The tokens are those of greedy
decoding, up to the rounding of products with more rows.

Decisions: DECODE-7.
"""

# S drafted tokens, D model, V vocabulary.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.generate.engine import Request, RunningRequest, noise_seed
from mythos_dist.generate.sampling import Sampling, check_finite, request_errors
from mythos_dist.model.activations import UNSET, Activations
from mythos_dist.model.attention import PassContext
from mythos_dist.model.decode import enter, logits_of, prefill
from mythos_dist.model.kv_cache import KVCache
from mythos_dist.model.mythos import Mythos


@dataclass
class Speculation:
    """A finished request, and how well its drafts did."""

    request: Request
    drafted: int = 0  # tokens
    accepted: int = 0  # drafted tokens that greedy decoding chooses as well
    loops: int = 0  # passes of the looped block after the prompt; those of verification count once for all their tokens

    @property
    def loops_per_token(self) -> float:
        """Passes of the looped block for each token after the first; greedy decoding has n_loops."""
        return self.loops / max(1, len(self.request.tokens) - 1)


def speculation_errors(sampling: Sampling, n_loops: int, draft_loops: int, draft_tokens: int) -> list[str]:
    """The errors in the settings, one line each."""
    errors = []
    if not 1 <= draft_loops < n_loops:
        errors.append(f"draft_loops={draft_loops} must be from 1 to {n_loops - 1}: fewer than n_loops={n_loops}")
    if draft_tokens < 1:
        errors.append(f"draft_tokens={draft_tokens} must be at least 1")
    if sampling.temperature != 0 or sampling.repetition_penalty != 1:
        errors.append("draft_loops needs greedy decoding: temperature=0 and repetition_penalty=1")
    if sampling.exit is not None or sampling.logprobs:
        errors.append("draft_loops does not go with exit or logprobs")
    return errors


@torch.inference_mode()
def speculate(
    model: Mythos,
    tokenizer: Tokenizer | None,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    n_loops: int,
    draft_loops: int,
    draft_tokens: int = 4,
    prefill_chunk: int = 512,
) -> Speculation:
    """Decode one request greedily, `draft_tokens` at a time, with a cache entry for every loop.

    model: in eval mode. n_loops: if `sampling` does not set it. Raises UserError for invalid settings, or if logits are
    not finite.
    """
    n_loops = sampling.n_loops or n_loops
    errors = request_errors(model.config, model.recurrent.act.mode, tokenizer, prompt, sampling)
    if errors := errors + speculation_errors(sampling, n_loops, draft_loops, draft_tokens):
        raise UserError(errors)
    request = Request(list(prompt), sampling)
    result = Speculation(request)
    if sampling.max_new_tokens == 0:
        request.finish_reason = "length"
        return result
    row, cache = RunningRequest(request, tokenizer), KVCache(rows=1)
    ids = torch.tensor([request.prompt], device=model.embed.weight.device)
    logits = prefill(model, ids, n_loops, cache, prefill_chunk, [noise_seed(request, 0)])
    row.add(_likeliest(logits)[0], n_loops)
    while request.finish_reason is None:
        count = min(draft_tokens, sampling.max_new_tokens - len(request.tokens))
        start = cache.tokens
        states, drafts = _draft(model, cache, request, draft_loops, count)
        cache.lengths = [start]
        verified = _verify(model, cache, states, draft_loops, n_loops)
        agreed = next((i for i, pair in enumerate(zip(drafts, verified, strict=True)) if pair[0] != pair[1]), count)
        result.drafted, result.accepted = result.drafted + count, result.accepted + agreed
        result.loops += draft_loops * count + n_loops - draft_loops
        kept = verified[: agreed + 1]
        cache.lengths = [start + len(kept)]
        for token in kept:
            row.add(token, n_loops)
            if request.finish_reason is not None:
                break
    return result


def _draft(
    model: Mythos, cache: KVCache, request: Request, loops: int, count: int
) -> tuple[list[Activations], list[int]]:
    """`count` tokens after the request's last, with `loops` loops each: the activations of each pass, the tokens."""
    states, drafts = [], request.tokens[-1:]
    for i in range(count):
        ids = torch.tensor([drafts[-1:]], device=model.embed.weight.device)
        seeds = torch.tensor([noise_seed(request, len(request.tokens) + i)], device=ids.device)
        context = model.context(ids, cache=cache)
        activations, output = _run_loops(model, enter(model, ids, context, seeds), range(loops), context)
        drafts.append(_likeliest(logits_of(model, output, context)[0])[0])
        cache.advance(1)
        states.append(activations)
    return states, drafts[1:]


def _verify(model: Mythos, cache: KVCache, states: Sequence[Activations], first: int, n_loops: int) -> list[int]:
    """The loops after the draft's, for all drafted positions at once: the most likely token after each."""
    fields = zip(*(state._replace(aux_loss=UNSET) for state in states), strict=True)
    joined = Activations(*(UNSET if parts[0] is None else torch.cat(parts, dim=1) for parts in fields))
    joined = joined._replace(aux_loss=states[0].aux_loss)
    context = model.context(joined.h[..., 0], cache=cache)
    _, output = _run_loops(model, joined, range(first, n_loops), context)
    return _likeliest(logits_of(model, output, context)[0])


def _run_loops(
    model: Mythos, activations: Activations, loops: range, context: PassContext
) -> tuple[Activations, Tensor]:
    """The activations after `loops`, and the output if the last of them is the last of all."""
    before, inputs = activations, model.recurrent.inputs(activations.e)
    for t in loops:
        before = activations
        activations = model.recurrent.advance(before, inputs, t, context)
    return activations, model.recurrent.act.final(before, activations)


def _likeliest(logits: Tensor) -> list[int]:
    """The most likely token of each row (S, V). Raises UserError if logits are not finite."""
    check_finite(logits)
    return logits.argmax(-1).tolist()
