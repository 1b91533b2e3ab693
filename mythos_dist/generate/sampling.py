"""How tokens are chosen: settings of a request, their checks, and the choice from one row of logits.

The order of filters is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. A row's random
numbers come from its own seed, one for each token, so its tokens do not depend on the other rows of the batch.
"""

# V vocabulary.

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from mythos_dist.config.schema import MAX_LOOPS, MythosConfig
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError

EXITS = ("latent", "kl", "halting")
MAX_LOGPROBS = 1000
# Huginn's (raven_modeling_minimal.py); halting: model.act_threshold.
EXIT_THRESHOLDS = {"latent": 0.03, "kl": 5e-4}


@dataclass(frozen=True)
class Sampling:
    """Settings of one request.

    >>> from mythos_dist import Sampling
    >>> Sampling(max_new_tokens=50, temperature=0.8, top_p=0.95, seed=1).exit is None  # all loops for each token
    True
    """

    max_new_tokens: int = 100
    n_loops: int | None = None  # None: the engine's
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # from the fewest tokens whose probabilities sum to this
    min_p: float = 0.0  # from tokens with at least this share of the highest probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens that occurred, multiplies negative ones (CTRL)
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end generation; they are left out of the text
    stop_tokens: tuple[int, ...] = ()  # tokens that end generation; they have no text
    exit: str | None = None  # end a token's loops early: latent, kl or halting (generate/exits.py); None: run all
    exit_threshold: float | None = None  # None: EXIT_THRESHOLDS; halting: model.act_threshold
    logprobs: int = 0  # log-probabilities of the chosen and of the N most likely tokens; 0: none


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities at one token, before temperature and filters."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # the most likely tokens, most likely first


def sampling_errors(sampling: Sampling, config: MythosConfig | None = None) -> list[str]:
    """The errors in the settings, one line each; those that depend on the model only with `config`."""
    errors = []
    for name, least, most in (
        ("max_new_tokens", 0, None), ("n_loops", 1, MAX_LOOPS), ("top_k", 0, None),
        ("logprobs", 0, MAX_LOGPROBS),
    ):  # fmt: skip
        errors += _whole_number_errors(name, getattr(sampling, name), least, most, optional=name == "n_loops")
    for name, valid, words in (
        ("temperature", lambda x: 0 <= x < math.inf, "a finite number of at least 0; 0 takes the most likely token"),
        ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
        ("min_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
        ("repetition_penalty", lambda x: 0 < x < math.inf, "a finite number above 0"),
        ("exit_threshold", lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
    ):
        value = getattr(sampling, name)
        if value is None and name == "exit_threshold":
            continue
        if not isinstance(value, Real) or isinstance(value, bool) or not valid(value):
            errors.append(f"{name}={value!r} must be {words}")
    seed = sampling.seed
    if not isinstance(seed, Integral) or not 0 <= int(seed) < 1 << 63:
        errors.append(f"seed={seed!r} must be from 0 to 2^63 - 1")
    errors += _exit_errors(sampling)
    errors += [f"stop={text!r} is not a text of at least one character" for text in sampling.stop if not text]
    for token in sampling.stop_tokens:
        if not isinstance(token, Integral):
            errors.append(f"stop_token={token!r} must be a token id")
        elif config is not None and not 0 <= token < config.vocab_size:
            errors.append(f"stop_token={token} is out of range for model.vocab_size={config.vocab_size}")
    return errors


def _whole_number_errors(name: str, value: object, least: int, most: int | None, optional: bool) -> list[str]:
    if value is None and optional:
        return []
    if not isinstance(value, Integral) or isinstance(value, bool):
        return [f"{name}={value!r} must be a whole number"]
    if int(value) < least:
        return [f"{name}={value} must be at least {least}"]
    return [f"{name}={value} must be at most {most}"] if most is not None and int(value) > most else []


def _exit_errors(sampling: Sampling) -> list[str]:
    if sampling.exit is None:
        return ["exit_threshold needs exit"] if sampling.exit_threshold is not None else []
    if sampling.exit not in EXITS:
        return [f"exit={sampling.exit!r} is unknown; use one of {', '.join(EXITS)}"]
    return []


def request_errors(
    config: MythosConfig, mode: str, tokenizer: Tokenizer | None, prompt: Sequence[int], sampling: Sampling
) -> list[str]:
    """The errors in a request, one line each. mode: the model's `act.mode`."""
    errors = sampling_errors(sampling, config)
    if sampling.exit == "halting" and mode == "off":
        errors.append("exit=halting needs a model with halting (act.mode); use exit=latent or exit=kl")
    if sampling.stop and tokenizer is None:
        errors.append("stop needs a tokenizer; use stop_tokens")
    if not prompt:
        errors.append("the prompt has no tokens")
    elif min(prompt) < 0 or max(prompt) >= config.vocab_size:
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        errors.append(
            f"token id {wrong} is out of range for model.vocab_size={config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    return errors + _length_errors(len(prompt), sampling.max_new_tokens, config.max_seq_len)


def _length_errors(prompt: int, new: int, max_seq_len: int) -> list[str]:
    """Errors if `prompt` and `new` tokens do not fit into `max_seq_len`."""
    if prompt > max_seq_len:
        return [
            f"the prompt of {prompt} tokens is longer than the context model.max_seq_len={max_seq_len}; "
            f"shorten it to at most {max_seq_len - 1} tokens"
        ]
    if isinstance(new, Integral) and prompt + max(0, new) > max_seq_len:
        room = f"ask for at most {max_seq_len - prompt}" if prompt < max_seq_len else "shorten the prompt"
        return [
            f"a prompt of {prompt} tokens and max_new_tokens={new} go beyond the context "
            f"model.max_seq_len={max_seq_len}; {room}"
        ]
    return []


def check_finite(logits: Tensor) -> None:
    """Raises UserError unless each row of logits (B, V) has a finite largest value: -inf beside it is valid."""
    if not bool(logits.amax(-1).isfinite().all()):
        raise UserError("the model's logits are not finite: its weights have diverged, or n_loops is too large")


def choose_token(logits: Tensor, sampling: Sampling, seen: Sequence[int], draw: random.Random) -> int:
    """The next token from one row's logits (V,) fp32. seen: the row's tokens, prompt included."""
    if sampling.repetition_penalty != 1:
        ids = torch.tensor(sorted(set(seen)), device=logits.device)
        values, penalty = logits[ids], sampling.repetition_penalty
        logits = logits.index_copy(0, ids, torch.where(values > 0, values / penalty, values * penalty))
    if sampling.temperature == 0:
        return int(logits.argmax())
    # In fp64 with the largest logit at 0, no temperature above 0 gives NaN.
    scaled, ids = (logits.double() - logits.max()) / sampling.temperature, None
    if 0 < sampling.top_k < len(scaled):
        scaled, ids = scaled.topk(sampling.top_k)
    elif sampling.top_p < 1:
        scaled, ids = scaled.sort(descending=True)
    shares = scaled.softmax(-1)
    if sampling.top_p < 1:  # a token is kept if the more likely ones do not reach top_p
        shares = torch.where(shares.cumsum(-1) - shares < sampling.top_p, shares, 0)
    if sampling.min_p > 0:
        shares = torch.where(shares >= sampling.min_p * shares.max(), shares, 0)
    limits = shares.cumsum(-1)
    index = int(torch.searchsorted(limits, limits[-1:] * draw.random(), right=True))
    index = min(index, len(limits) - 1)
    return index if ids is None else int(ids[index])


def token_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """The log-probability of `token` and the `count` highest, from logits (V,)."""
    values = logits.log_softmax(-1)
    top = values.topk(min(count, len(values)))
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprob(token, float(values[token]), pairs)
