"""Checks of the arguments of `Mythos`: without them, token ids beyond the vocabulary would give logits silently.

Reading ids on a GPU synchronizes with it. So the trainer, whose batches come from verified shards, passes `loops` and
skips the checks; other callers pass `n_loops` and do not.

Decisions: MODEL-16.
"""

import operator
from typing import Any

import torch
from torch import Tensor

from mythos_dist.config.schema import MAX_LOOPS, ActConfig, ExpertsConfig, MythosConfig
from mythos_dist.errors import UserError
from mythos_dist.parallel.tensor import IGNORED


def check_arguments(config: Any, act: Any, experts: Any, attention: Any) -> None:
    """The arguments of the constructor. Raises UserError with all problems."""
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
    """(loops, how many of them run without gradient). Raises UserError for invalid values."""
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
    """input_ids (B, S); labels (B, S), (B, T, S) or None; document_ids (B, S) or None. Raises UserError with all
    problems."""
    problems = [type_problem("input_ids", input_ids, 2)]
    if not problems[0]:
        if input_ids.numel() == 0:
            problems.append(f"input_ids has shape {tuple(input_ids.shape)}; give at least one sequence of one token")
        else:
            problems.append(_range_problem("input_ids", input_ids, config.vocab_size))
    batch_shape = None if problems[0] else tuple(input_ids.shape)
    for name, ids in {"labels": labels, "document_ids": document_ids}.items():
        if ids is None:
            continue
        if problem := type_problem(name, ids, None):
            problems.append(problem)
            continue
        shape = tuple(ids.shape)
        if name == "labels" and ids.dim() == 3:
            shape = (shape[0], shape[2])
        if batch_shape is not None and shape != batch_shape:
            problems.append(f"{name} has shape {tuple(ids.shape)}, input_ids {batch_shape}; give one for each token")
        elif name == "labels" and ids.numel():
            problems.append(_range_problem(name, ids.masked_fill(ids == IGNORED, 0), config.vocab_size))
    if any(problems):
        raise UserError([problem for problem in problems if problem])


def type_problem(name: str, ids: Any, dims: int | None) -> str | None:
    """What is wrong with the type of token ids, or None. dims: the required number of dims; None: any."""
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
    low, high = torch.stack(ids.aminmax()).tolist()  # one synchronization for both
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        return (
            f"{name}: token id {wrong} is out of range for model.vocab_size={vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    return None
