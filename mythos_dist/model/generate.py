"""Autoregressive sampling with a key-value cache, for a batch of prompts of one length."""

import torch
from torch import Tensor

from mythos_dist.errors import UserError
from mythos_dist.model.attention import KVCache
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

    temperature 0 takes the likeliest token; top_k 0, or one beyond the vocabulary, samples from all tokens.
    A row that has produced `stop_token` is filled with it; when all rows have, generation ends.
    The prompt is read `prefill_chunk` tokens at a time. max_new_tokens defaults to `model.max_output_tokens`, or to
    what the context leaves. Raises UserError naming the argument that cannot be used.
    """
    config = model.config
    room = config.max_seq_len - input_ids.shape[1] if input_ids.dim() == 2 else 0
    max_new_tokens = min(config.max_output_tokens, room) if max_new_tokens is None else max_new_tokens
    _check(model, input_ids, max_new_tokens, temperature, top_k, prefill_chunk)

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
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def _check(
    model: Mythos, input_ids: Tensor, max_new_tokens: int, temperature: float, top_k: int, prefill_chunk: int
) -> None:
    config, problems = model.config, []
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise UserError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected (at least one prompt, at least one token)"
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        problems.append(
            f"token id {low if low < 0 else high} is out of range for model.vocab_size={config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    if input_ids.shape[1] + max_new_tokens > config.max_seq_len:
        problems.append(
            f"a prompt of {input_ids.shape[1]} tokens and max_new_tokens={max_new_tokens} go beyond the context "
            f"model.max_seq_len={config.max_seq_len}; ask for at most {config.max_seq_len - input_ids.shape[1]}"
        )
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("temperature", temperature, 0),
        ("top_k", top_k, 0),
        ("prefill_chunk", prefill_chunk, 1),
    ):
        if not value >= least:
            problems.append(f"{name}={value} must be at least {least}")
    if problems:
        raise UserError(problems)
