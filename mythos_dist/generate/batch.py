"""`Mythos.generate`: the engine, for a batch of prompts of one length."""

from typing import Any

import torch
from torch import Tensor

from mythos_dist.errors import UserError
from mythos_dist.generate.engine import DecodingEngine
from mythos_dist.generate.sampling import Sampling, request_errors
from mythos_dist.model.kv_cache import loops_per_entry
from mythos_dist.model.mythos import Mythos


def generate(
    model: Mythos,
    input_ids: Tensor,
    max_new_tokens: int | None = None,
    *,
    top_k: int = 50,
    stop_token: int | None = None,
    prefill_chunk: int = 512,
    cache: str = "all",
    generator: torch.Generator | None = None,
    **sampling: Any,
) -> Tensor:
    """Continue prompts (B, S) by up to max_new_tokens: (B, S + new) int64.

    A row that has produced `stop_token` is padded with it; when all rows have, generation ends. The prompt is read
    `prefill_chunk` tokens at a time. max_new_tokens defaults to `model.max_output_tokens`, at most the rest of the
    context. Rows draw from seeds of their own, which `generator` draws. sampling: further fields of
    `mythos_dist.generate.sampling.Sampling`. Raises UserError for invalid arguments, or if logits are not finite.
    """
    _check_ids(input_ids)
    config = model.config
    if max_new_tokens is None:
        max_new_tokens = min(config.max_output_tokens, max(0, config.max_seq_len - input_ids.shape[1]))
    stop_tokens = () if stop_token is None else (stop_token,)
    settings: dict[str, Any] = dict(max_new_tokens=max_new_tokens, top_k=top_k, stop_tokens=stop_tokens, **sampling)
    prompts, mode = input_ids.tolist(), model.recurrent.act.mode
    errors = [error for row in prompts for error in request_errors(config, mode, None, row, Sampling(**settings))]
    if not isinstance(prefill_chunk, int) or prefill_chunk < 1:
        errors.append(f"prefill_chunk={prefill_chunk!r} must be a whole number of at least 1")
    try:
        loops_per_entry(cache)
    except UserError as error:
        errors.append(str(error))
    if errors:
        raise UserError(list(dict.fromkeys(errors)))
    seeds = torch.randint(1 << 62, (len(prompts),), generator=generator).tolist()
    was_training = model.training
    try:
        engine = DecodingEngine(
            model,
            None,
            n_loops=config.max_loop_iters,
            max_batch=len(prompts),
            cache=cache,
            prefill_chunk=prefill_chunk,
            copy_weights=False,
        )
        seeded = [Sampling(**settings, seed=seed) for seed in seeds]
        requests = [engine.submit(row, one) for row, one in zip(prompts, seeded, strict=True)]
        engine.run()
    finally:
        model.train(was_training)
    longest = max(len(request.tokens) for request in requests)
    pad = 0 if stop_token is None else stop_token  # rows are equally long without a stop token
    new = [request.tokens + [pad] * (longest - len(request.tokens)) for request in requests]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _check_ids(input_ids: Tensor) -> None:
    """Raises UserError if `input_ids` is not a batch of prompts."""
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise UserError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected (at least one prompt, at least one token)"
        )
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise UserError(f"input_ids has dtype {input_ids.dtype}; expected integer token ids, such as torch.int64")
