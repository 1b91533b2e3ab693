"""Sequences that are too long for a cluster: the longest that fit, and settings with which these would fit.

Nothing is reported that has not been planned: a setting helps if some layout with it fits.

Decisions: PLAN-7.
"""

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mythos_dist.config.rules import problems
from mythos_dist.config.schema import Config
from mythos_dist.ops.plan.clusters import Cluster
from mythos_dist.ops.plan.estimate import Estimate, with_layout
from mythos_dist.ops.plan.search import CONTEXTS, MIN_CONTEXT_TOKENS, first_that_fits, search, variants_of

_MIN_SEQ_LEN = 256  # tokens: shorter lengths are not tried


def longest_length(config: Config, gpus: int, cluster: Cluster, fixed: Mapping[str, Any]) -> Estimate | None:
    """A layout with the longest sequences that fit on these GPUs, found by halving the length and then, for the layouts
    that fit there, by bisection in steps of a thirty-second of it. None: no shorter length fits either."""
    too_long = config.train.seq_len
    while (seq_len := too_long // 2) >= _MIN_SEQ_LEN:
        result = search(with_layout(config, seq_len=seq_len), gpus, cluster, fixed)
        if result.best:
            candidates = {estimate.config.parallel: estimate for estimate in result.best}.values()
            longest = [_stretch(estimate, seq_len, too_long, fixed) for estimate in candidates]
            return max(longest, key=lambda estimate: estimate.config.train.seq_len)
        too_long = seq_len
    return None


def _stretch(fitting: Estimate, seq_len: int, too_long: int, fixed: Mapping[str, Any]) -> Estimate:
    """The longest sequences between these lengths that fit in a layout, with chunks and saved hidden states as
    needed."""
    step = max(1, seq_len // 32)
    steps = range(seq_len // step, too_long // step)
    at = bisect.bisect_left(steps, True, key=lambda n: not _at_length(fitting, n * step, fixed).fits)
    return fitting if at == 0 else _at_length(fitting, steps[at - 1] * step, fixed)


def _at_length(estimate: Estimate, seq_len: int, fixed: Mapping[str, Any]) -> Estimate:
    return _planned(estimate, with_layout(estimate.config, seq_len=seq_len), fixed)


_LEAST_CONTEXT_TOKENS = 1024  # of a sequence on a rank, for degrees that a search leaves out as they are slow


def what_helps(config: Config, gpus: int, cluster: Cluster, fixed: Mapping[str, Any], smallest: Estimate) -> list[str]:
    """Settings with which sequences of this length fit on these GPUs; `smallest`: the layout that needs least memory,
    of those that do not fit."""
    return [
        *_other_than_fixed(config, gpus, cluster, fixed),
        *_higher_context(config, gpus, cluster, fixed),
        *_fewer_loops_with_gradient(smallest, fixed),
        *_more_host_memory(smallest),
    ]


def _other_than_fixed(config: Config, gpus: int, cluster: Cluster, fixed: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fixed.items():
        others = {key: fixed[key] for key in fixed if key != name}
        if best := search(config, gpus, cluster, others, keep=1).best:
            section = "parallel" if hasattr(config.parallel, name) else "train"
            chosen = getattr(getattr(best[0].config, section), name)
            yield f"{section}.{name}={_shown(chosen)} (--fixed {name}={_shown(value)})"


def _higher_context(config: Config, gpus: int, cluster: Cluster, fixed: Mapping[str, Any]) -> Iterator[str]:
    if "context" in fixed:
        return
    for context in CONTEXTS:
        tokens = config.train.seq_len // context
        if tokens < _LEAST_CONTEXT_TOKENS:
            return
        if context == 1 or tokens >= MIN_CONTEXT_TOKENS:
            continue  # these have been tried
        if search(config, gpus, cluster, {**fixed, "context": context}, keep=1).best:
            yield f"parallel.context={context}"
            return


def _fewer_loops_with_gradient(smallest: Estimate, fixed: Mapping[str, Any]) -> Iterator[str]:
    """The most that fit in the layout that needs least memory."""
    n_loops, no_grad = smallest.loops
    for backprop in range(n_loops - no_grad - 1, 0, -1):
        config = replace(smallest.config, loops=replace(smallest.config.loops, backprop=backprop))
        if not problems(config) and _planned(smallest, config, fixed).fits:
            yield f"loops.backprop={backprop} (gradient through the last loops only)"
            return


def _more_host_memory(smallest: Estimate) -> Iterator[str]:
    if smallest.host > smallest.cluster.usable_on_host and smallest.largest_stage.bytes <= smallest.cluster.usable:
        needed = f"{smallest.host / 1e9:.0f} GB per GPU for saved hidden states"
        yield f"nodes with more host memory ({needed}; host_memory_gb of the cluster file)"


def _planned(estimate: Estimate, config: Config, fixed: Mapping[str, Any]) -> Estimate:
    """Another config in the layout of an estimate, with chunks and saved hidden states as needed, but for `fixed`."""
    return first_that_fits(variants_of(config, fixed), estimate.world_size, estimate.cluster, estimate.imbalance)


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower()
