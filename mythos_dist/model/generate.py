"""Autoregressive sampling with a key-value cache, for a batch of prompts of one length."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from mythos_dist.config.schema import MAX_LOOPS
from mythos_dist.errors import UserError
from mythos_dist.model.kv_cache import KVCache
from mythos_dist.model.mythos import Mythos


@torch.no_grad()
def generate(
    model: Mythos,
    input_ids: Tensor,
    max_new_tokens: int | None = None,
    *,
    n_loops: int | None = None,
    temperature: float = 1.0,
    top_k: int = 50,
    stop_token: int | None = None,
    prefill_chunk: int = 512,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts (B, S) by up to max_new_tokens: (B, S + new) int64.

    temperature 0 takes the most likely token; top_k 0, or above the vocabulary size, samples from all tokens.
    A row that has produced `stop_token` is padded with it; when all rows have, generation ends.
    The prompt is read `prefill_chunk` tokens at a time. max_new_tokens defaults to `model.max_output_tokens`,
    at most the rest of the context. Raises UserError for invalid arguments, or if logits are not finite.
    """
    config = model.config
    room = max(0, config.max_seq_len - input_ids.shape[1]) if input_ids.dim() == 2 else 0
    max_new_tokens = min(config.max_output_tokens, room) if max_new_tokens is None else max_new_tokens
    errors = _token_errors(model, input_ids, stop_token)
    errors += _length_errors(input_ids.shape[-1], max_new_tokens, config.max_seq_len)
    errors += sampling_errors(
        max_new_tokens=max_new_tokens,
        n_loops=n_loops,
        temperature=temperature,
        top_k=top_k,
        prefill_chunk=prefill_chunk,
    )
    if errors:
        raise UserError(errors)

    was_training = model.training
    model.eval()
    cache = KVCache()
    tokens = input_ids
    stopped = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    try:
        for _ in range(max_new_tokens):
            chunks = tokens[:, cache.tokens :].split(prefill_chunk, dim=1)
            logits = [model(chunk, n_loops, cache=cache)[:, -1] for chunk in chunks][-1]  # (B, V)
            new = _sample(logits.float(), temperature, top_k, generator)  # -> (B,)
            if stop_token is not None:
                new = torch.where(stopped, stop_token, new)
                stopped = stopped | (new == stop_token)
            tokens = torch.cat([tokens, new.unsqueeze(1)], dim=1)
            if stop_token is not None and bool(stopped.all()):
                break
    finally:
        model.train(was_training)
    return tokens


def _sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) fp32 -> token ids (B,)."""
    if not bool(logits.amax(-1).isfinite().all()):  # -inf beside finite logits is valid
        raise UserError("the model's logits are not finite: its weights have diverged, or n_loops is too large")
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    # In float64 with the largest logit at 0, no temperature above 0 gives NaN.
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / temperature
    return torch.multinomial(scaled.softmax(-1).float(), 1, generator=generator).squeeze(-1)


def sampling_errors(
    *,
    max_new_tokens: int = 0,
    n_loops: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    prefill_chunk: int = 1,
) -> list[str]:
    """The errors in `generate`'s sampling arguments that do not depend on the model, one line each."""
    errors = []
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("n_loops", 1 if n_loops is None else n_loops, 1),
        ("top_k", top_k, 0),
        ("prefill_chunk", prefill_chunk, 1),
    ):
        if not isinstance(value, Integral):
            errors.append(f"{name}={value!r} must be a whole number")
        elif value < least:
            errors.append(f"{name}={value} must be at least {least}")
        elif name == "n_loops" and value > MAX_LOOPS:
            errors.append(f"{name}={value} must be at most {MAX_LOOPS}")
    if not (isinstance(temperature, Real) and 0 <= temperature < math.inf):
        errors.append(
            f"temperature={temperature!r} must be a finite number of at least 0; 0 takes the most likely token"
        )
    return errors


def _token_errors(model: Mythos, input_ids: Tensor, stop_token: int | None) -> list[str]:
    """The errors in the token ids. Raises UserError if `input_ids` is not a batch of prompts."""
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise UserError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected (at least one prompt, at least one token)"
        )
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise UserError(f"input_ids has dtype {input_ids.dtype}; expected integer token ids, such as torch.int64")
    errors, vocab_size = [], model.config.vocab_size
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        errors.append(
            f"token id {low if low < 0 else high} is out of range for model.vocab_size={vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    if stop_token is not None and not 0 <= stop_token < vocab_size:
        errors.append(f"stop_token={stop_token} is out of range for model.vocab_size={vocab_size}")
    return errors


def _length_errors(prompt: int, new: int, context: int) -> list[str]:
    """Errors if `prompt` and `new` tokens do not fit into `context` tokens."""
    if prompt > context:
        return [
            f"the prompt of {prompt} tokens is longer than the context model.max_seq_len={context}; "
            f"shorten it to at most {context - 1} tokens"
        ]
    if isinstance(new, Integral) and prompt + max(0, new) > context:
        room = f"ask for at most {context - prompt}" if prompt < context else "shorten the prompt"
        return [
            f"a prompt of {prompt} tokens and max_new_tokens={new} go beyond the context model.max_seq_len={context}; "
            f"{room}"
        ]
    return []
