"""Checks of what a caller gives to `Mythos`: without them, token ids beyond the vocabulary give logits all the same.

Looking at ids on a GPU waits for it. So the trainer, whose batches come from verified shards, passes `loops` and is not
checked; everybody else passes `n_loops` and is.
"""

import operator
from typing import Any

import torch
from torch import Tensor

from mythos_dist.config.schema import MAX_LOOPS, ActConfig, ExpertsConfig, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.parallel.tensor import IGNORED


def check_arguments(config: Any, act: Any, experts: Any, attention: Any) -> None:
    """What `Mythos` is built from. Raises UserError with all that is wrong."""
    wanted = {"config": (config, MythosConfig), "act": (act, ActConfig), "experts": (experts, ExpertsConfig)}
    problems = [
        f"{name} is a {type(value).__name__}; expected a {kind.__name__}"
        for name, (value, kind) in wanted.items()
        if not isinstance(value, kind)
    ]
    if attention not in ("auto", "flash_attn", "sdpa"):
        problems.append(f"attention={attention!r}: expected 'auto', 'flash_attn' or 'sdpa'")
    if problems:
        raise UserError(problems)


def resolve_n_loops(n_loops: Any, backprop: Any, config: MythosConfig) -> tuple[int, int]:
    """(loops, how many of them get no gradient). Raises UserError for what is no number of loops."""
    n_loops = config.max_loop_iters if n_loops is None else n_loops
    for name, value in {"n_loops": n_loops, "backprop": backprop}.items():
        if name == "backprop" and value is None:
            continue
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise UserError(f"{name}={value!r}: expected a whole number")
        if not 1 <= operator.index(value) <= MAX_LOOPS:
            raise UserError(f"{name}={value} must be at least 1 and at most {MAX_LOOPS}")
    n_loops = operator.index(n_loops)
    return n_loops, 0 if backprop is None else max(0, n_loops - operator.index(backprop))


def check_tokens(input_ids: Any, labels: Any, document_ids: Any, config: MythosConfig) -> None:
    """input_ids (B, S); labels (B, S) or (B, T, S), document_ids (B, S), both perhaps None. Raises UserError with all
    that is wrong."""
    found = [type_problem("input_ids", input_ids, 2)]
    if not found[0]:
        if input_ids.numel() == 0:
            found.append(f"input_ids has shape {tuple(input_ids.shape)}; give at least one sequence of one token")
        else:
            found.append(_range_problem("input_ids", input_ids, config.vocab_size))
    B, S = input_ids.shape if not found[0] else (0, 0)
    for name, ids in {"labels": labels, "document_ids": document_ids}.items():
        if ids is None:
            continue
        if problem := type_problem(name, ids, None):
            found.append(problem)
        elif not found[0] and not (
            ids.shape == (B, S) or (name == "labels" and ids.dim() == 3 and (ids.shape[0], ids.shape[2]) == (B, S))
        ):
            found.append(f"{name} has shape {tuple(ids.shape)}, input_ids {(B, S)}; give one for each token")
        elif name == "labels" and ids.numel():
            found.append(_range_problem(name, ids.masked_fill(ids == IGNORED, 0), config.vocab_size))
    if problems := [problem for problem in found if problem]:
        raise UserError(problems)


def type_problem(name: str, ids: Any, dims: int | None) -> str | None:
    """What is wrong with the type of token ids; None if nothing. dims: how many there must be; None: any number."""
    if not isinstance(ids, Tensor):
        return f"{name} is a {type(ids).__name__}; expected a tensor of token ids (batch, tokens)"
    if ids.dtype not in (torch.int64, torch.int32):
        return f"{name} has dtype {ids.dtype}; expected torch.int64 (or int32): token ids, not text or embeddings"
    if dims is not None and ids.dim() != dims:
        return f"{name} has shape {tuple(ids.shape)}; expected (batch, tokens), such as {name}.unsqueeze(0) of one text"
    return None


def _range_problem(name: str, ids: Tensor, vocab_size: int) -> str | None:
    if ids.is_meta:
        return None
    low, high = torch.stack(ids.aminmax()).tolist()  # one wait for both
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        return (
            f"{name}: token id {wrong} is out of range for model.vocab_size={vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    return None
