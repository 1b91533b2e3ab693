"""Rules for loops and layouts, and for a broken rule the nearest values that satisfy it.

Every remedy is tried before it is proposed: it satisfies the rule, and breaks no other rule wherever such a value
exists. The trap: a rule must not judge a value that another rule refuses already. So rules about replicas hold while
ranks do not form complete replicas; values out of their range do not get here (fields.py).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from mythos_dist.config.fields import as_lists, kinds_of
from mythos_dist.config.schema import Config, LoopsConfig, MythosConfig, OptimConfig, ParallelConfig, TrainConfig
from mythos_dist.units import count


class Problem(NamedTuple):
    """A refusal, and the settings whose values it is about."""

    settings: tuple[str, ...]
    message: str  # what is wrong and why; what to do


@dataclass(frozen=True)
class Layout:
    """The sections that rules are about, and the number of ranks. 0: unknown, and so are replicas."""

    model: MythosConfig
    loops: LoopsConfig
    parallel: ParallelConfig
    train: TrainConfig
    optim: OptimConfig
    ranks: int = 0

    @property
    def mean_loops(self) -> int:
        return self.loops.mean_of(self.model)

    @property
    def replicas(self) -> int:
        """0 if the ranks do not form complete replicas."""
        return 0 if self.ranks % self.parallel.ranks_per_replica else self.ranks // self.parallel.ranks_per_replica

    @property
    def data_context(self) -> int:
        """Ranks of data x context."""
        return self.replicas * self.parallel.context

    @property
    def tokens_per_piece(self) -> int:
        """Sequences are divided over the context axis in pieces of at least this many tokens."""
        return self.parallel.tensor if self.parallel.sequence else 1

    @property
    def sequences_per_pass(self) -> int:
        """In one micro-batch of all replicas."""
        return self.train.micro_batch * self.replicas

    def value(self, setting: str) -> Any:
        """The value of a setting such as "parallel.tensor"; "ranks" is the number of ranks."""
        if setting == "ranks":
            return self.ranks
        if setting == "loops.mean":
            return self.mean_loops
        section, _, key = setting.partition(".")
        return getattr(getattr(self, section), key)

    def with_value(self, setting: str, value: Any) -> "Layout":
        if setting == "ranks":
            return replace(self, ranks=value)
        section, _, key = setting.partition(".")
        return replace(self, **{section: replace(getattr(self, section), **{key: value})})

    def describe(self, setting: str) -> str:
        """`setting=value`; for an unset loops.mean also the setting that replaces it."""
        if setting == "ranks":
            return count(self.ranks, "rank")
        if setting == "loops.mean" and self.loops.mean is None:
            return f"loops.mean=null (model.max_loop_iters={self.model.max_loop_iters})"
        return f"{setting}={_yaml(self.value(setting))}"


@dataclass(frozen=True)
class Rule:
    """A layout that breaks it is refused."""

    settings: tuple[str, ...]  # that it compares
    holds: Callable[[Layout], bool]
    message: str  # what is wrong and why; each {} becomes `setting=value` of the next of `settings`
    change: tuple[str, ...]  # settings that a user may change to satisfy it, the likeliest first


_RULES = (
    Rule(
        settings=("loops.maximum", "loops.mean"),
        holds=lambda at: at.loops.maximum is None or at.loops.maximum >= at.mean_loops,
        message="{} is less than {}: no step runs more than the maximum",
        change=("loops.maximum", "loops.mean"),
    ),
    Rule(
        settings=("loops.backprop", "loops.mean", "loops.distribution"),
        holds=lambda at: at.loops.distribution != "fixed" or (at.loops.backprop or 0) <= at.mean_loops,
        message="{} is more than {}, and a step with {} never runs more",
        change=("loops.backprop",),
    ),
    Rule(
        settings=("train.recompute_every", "train.recompute"),
        holds=lambda at: at.train.recompute_every == 1 or at.train.recompute == "loop",
        message="{} has no effect with {}: only `loop` recomputes several loops at once",
        change=("train.recompute", "train.recompute_every"),
    ),
    Rule(
        settings=("train.offload", "train.recompute"),
        holds=lambda at: at.train.offload == "none" or at.train.recompute == "loop",
        message="{} has nothing to move with {}: what goes to host memory is the input of each recomputed loop",
        change=("train.recompute", "train.offload"),
    ),
    Rule(
        settings=("parallel.zero", "parallel.pipe"),
        holds=lambda at: at.parallel.zero == 1 or at.parallel.pipe == 1,
        message="{} does not work with {}: DeepSpeed's PipelineEngine cannot shard gradients or parameters",
        change=("parallel.zero", "parallel.pipe"),
    ),
    Rule(
        settings=("optim.name", "parallel.zero"),
        holds=lambda at: at.optim.name != "muon" or at.parallel.zero < 3,
        message="{} does not work with {}: DeepSpeed shards every matrix over all replicas there",
        change=("parallel.zero", "optim.name"),
    ),
    Rule(
        settings=("parallel.pipe", "loops.mean"),
        holds=lambda at: at.parallel.pipe <= at.mean_loops + 2,
        message="{} is more than {} + 2: every stage except the first and the last must run a loop",
        change=("parallel.pipe",),
    ),
    Rule(
        settings=("model.n_experts", "parallel.expert"),
        holds=lambda at: at.model.n_experts % at.parallel.expert == 0,
        message="{} is not divisible by {}: each rank of an expert group holds the same number of experts",
        change=("parallel.expert",),
    ),
    Rule(
        settings=("model.n_heads", "parallel.tensor"),
        holds=lambda at: at.model.n_heads % at.parallel.tensor == 0,
        message="{} is not divisible by {}: each tensor rank computes the same number of complete heads",
        change=("parallel.tensor",),
    ),
    Rule(
        settings=("model.dim", "parallel.tensor", "parallel.expert"),
        holds=lambda at: at.parallel.expert == 1 or at.model.dim % at.parallel.tensor == 0,
        message="{} is not divisible by {}: with {} each tensor rank sends an equal part of every row",
        change=("parallel.tensor", "parallel.expert"),
    ),
    Rule(
        settings=("train.seq_len", "parallel.tensor", "parallel.sequence"),
        holds=lambda at: not at.parallel.sequence or at.train.seq_len % at.parallel.tensor == 0,
        message="{} is not divisible by {}: with {} each tensor rank holds an equal part of the sequence",
        change=("train.seq_len", "parallel.tensor", "parallel.sequence"),
    ),
    Rule(
        settings=("parallel.context", "train.seq_len"),
        holds=lambda at: at.parallel.context == 1 or at.train.seq_len >= 2 * at.parallel.context * at.tokens_per_piece,
        message="{} is too many for {}: each rank gets at least two pieces of a sequence, of {at.tokens_per_piece} or "
        "more tokens",
        change=("parallel.context", "train.seq_len"),
    ),
    Rule(
        settings=("model.dropout", "parallel.context"),
        holds=lambda at: at.model.dropout == 0 or at.parallel.context == 1,
        message="{} does not work with {}: attention computes the scores of keys piece by piece, and again in the "
        "backward pass, where their dropout would be another",
        change=("model.dropout", "parallel.context"),
    ),
    Rule(
        settings=("train.batch_ramp", "train.global_batch"),
        holds=lambda at: all(before < after for before, after in pairwise(at.train.batch_sizes)),
        message="{} (sequences, steps) has batches that do not grow from each to the next and to {}",
        change=("train.batch_ramp",),
    ),
    Rule(
        settings=("train.batch_ramp", "train.micro_batch"),
        holds=lambda at: all(size % at.train.micro_batch == 0 for size, _ in at.train.batch_ramp),
        message="{} (sequences, steps) has batches that are not divisible by {}",
        change=("train.micro_batch", "train.batch_ramp"),
    ),
)
_RANK_RULES = (
    Rule(
        settings=("parallel.pipe", "parallel.tensor"),
        holds=lambda at: at.parallel.context > 1 or at.ranks % at.parallel.ranks_per_replica == 0,
        message="the number of ranks, {at.ranks}, is not divisible by {} x {} = {at.parallel.ranks_per_replica}, the "
        "ranks of one replica",
        change=("parallel.tensor", "parallel.pipe", "ranks"),
    ),
    Rule(
        settings=("parallel.pipe", "parallel.context", "parallel.tensor"),
        holds=lambda at: at.parallel.context == 1 or at.ranks % at.parallel.ranks_per_replica == 0,
        message="the number of ranks, {at.ranks}, is not divisible by {} x {} x {} = {at.parallel.ranks_per_replica}, "
        "the ranks of one replica",
        change=("parallel.context", "parallel.tensor", "parallel.pipe", "ranks"),
    ),
    Rule(
        settings=("ranks", "parallel.pipe", "parallel.tensor", "parallel.expert"),
        holds=lambda at: at.parallel.context > 1 or at.replicas % at.parallel.expert == 0,
        message="the number of replicas, {at.replicas} ({} / {} / {}), is not divisible by {}, the replicas that share "
        "one copy of the experts",
        change=("parallel.expert", "ranks"),
    ),
    Rule(
        settings=("ranks", "parallel.pipe", "parallel.tensor", "parallel.expert"),
        holds=lambda at: at.parallel.context == 1 or at.data_context % at.parallel.expert == 0,
        message="data x context, {at.data_context} ranks ({} / {} / {}), is not divisible by {}, the ranks that share "
        "one copy of the experts",
        change=("parallel.expert", "ranks"),
    ),
    Rule(
        settings=("train.global_batch", "train.micro_batch"),
        holds=lambda at: not at.replicas or at.train.global_batch % at.sequences_per_pass == 0,
        message="{} is not divisible by {} x {at.replicas} (replicas) = {at.sequences_per_pass}: every replica runs "
        "the same number of micro-batches",
        change=("train.micro_batch", "train.global_batch"),
    ),
    Rule(
        settings=("train.batch_ramp", "train.micro_batch"),
        holds=lambda at: not at.replicas or all(size % at.sequences_per_pass == 0 for size, _ in at.train.batch_ramp),
        message="{} (sequences, steps) has batches that are not divisible by {} x {at.replicas} (replicas) = "
        "{at.sequences_per_pass}: every replica runs the same number of micro-batches",
        change=("train.micro_batch", "train.batch_ramp", "ranks"),
    ),
)

# Values that a remedy may propose, before they are tried.
_CANDIDATES: dict[str, Callable[[Layout], Iterable[Any]]] = {
    "loops.maximum": lambda at: [at.mean_loops],
    "loops.mean": lambda at: [at.loops.maximum],
    "loops.backprop": lambda at: [at.mean_loops],
    "train.recompute": lambda at: ["loop"],
    "train.recompute_every": lambda at: [1],
    "train.offload": lambda at: ["none"],
    "train.seq_len": lambda at: [
        n
        for n in [
            *_multiples_near(at.train.seq_len, at.parallel.tensor),
            2 * at.parallel.context * at.tokens_per_piece,
        ]
        if n <= at.model.max_seq_len
    ],
    "train.micro_batch": lambda at: divisors(at.train.global_batch),
    "train.global_batch": lambda at: _multiples_near(at.train.global_batch, at.sequences_per_pass),
    "train.batch_ramp": lambda at: _ramps_near(at, at.sequences_per_pass or at.train.micro_batch),
    "parallel.zero": lambda at: [1, 2],
    "optim.name": lambda at: ["adamw"],
    # The extremes, and where the number of ranks is known its divisors.
    "parallel.pipe": lambda at: [n for n in {1, at.mean_loops + 2, *divisors(at.ranks)} if n <= at.mean_loops + 2],
    "parallel.expert": lambda at: divisors(at.model.n_experts),
    "parallel.tensor": lambda at: divisors(at.model.n_heads),
    "parallel.sequence": lambda at: [False],
    # On any number of ranks, the largest for the length.
    "parallel.context": lambda at: [1, *divisors(at.ranks), at.train.seq_len // (2 * at.tokens_per_piece)],
    "model.dropout": lambda at: [0.0],
    # Replicas that divide the batch, and in case none of them fits the experts, replicas that do.
    "ranks": lambda at: (
        [at.parallel.ranks_per_replica * n for n in divisors(at.train.global_batch // at.train.micro_batch)]
        + _multiples_near(at.ranks, at.parallel.ranks_per_replica * at.parallel.expert)
    ),
}


def layout_problems(config: Config, world_size: int = 0) -> list[str]:
    """What is wrong with a layout on `world_size` ranks but would not be on others, a line each.

    Without a number of ranks: what is wrong on any number (rules.py includes these).
    """
    return [problem.message for problem in find_layout_problems(config, world_size)]


def find_layout_problems(config: Config, world_size: int = 0) -> list[Problem]:
    """As `layout_problems`, with the settings of each."""
    at = Layout(config.model, config.loops, config.parallel, config.train, config.optim, world_size)
    broken = _broken_rules(at)
    return [_problem(rule, at, broken) for rule in broken if rule in (_RANK_RULES if world_size else _RULES)]


def works(config: Config, world_size: int) -> bool:
    """Whether no rule is broken; fast, for a search over thousands of layouts."""
    at = Layout(config.model, config.loops, config.parallel, config.train, config.optim, world_size)
    return all(rule.holds(at) for rule in _RULES + _RANK_RULES)


def _broken_rules(at: Layout) -> list[Rule]:
    return [rule for rule in _RULES + _RANK_RULES if not rule.holds(at)]


def _problem(rule: Rule, at: Layout, broken: list[Rule]) -> Problem:
    """The refusal and its remedies. Remedies that break a rule not in `broken` come last and say so."""
    sufficient, insufficient = [], []
    for setting in rule.change:
        satisfying, clean = [], []
        for value in _CANDIDATES[setting](at):
            if not _in_range(at, setting, value):
                continue
            changed = at.with_value(setting, value)
            if rule.holds(changed):
                satisfying.append(value)
                if all(other in broken for other in _broken_rules(changed)):
                    clean.append(value)
        if clean:
            sufficient.append(_remedy(setting, at.value(setting), clean))
        elif satisfying:
            insufficient.append("with further changes " + _remedy(setting, at.value(setting), satisfying))
    message = rule.message.format(*map(at.describe, rule.settings), at=at)
    if remedies := ", or ".join(sufficient + insufficient):
        message += f"; {remedies}"
    settings = rule.settings
    if "loops.mean" in settings and at.loops.mean is None:
        settings += ("model.max_loop_iters",)
    return Problem(settings, message)


def _in_range(at: Layout, setting: str, value: Any) -> bool:
    section, _, key = setting.partition(".")
    return setting == "ranks" or kinds_of(type(getattr(at, section)))[key].problem(value) is None


def _remedy(setting: str, value: Any, choices: list[Any]) -> str:
    choices = sorted(set(choices))
    if setting == "train.micro_batch":  # which one is best depends on memory
        choices = few(choices, value)
    elif isinstance(value, int):
        choices = nearest(value, choices)
    name = "the number of ranks" if setting == "ranks" else setting
    return f"set {name} to {_yaml(choices[0]) if len(choices) == 1 else f'one of {as_lists(choices)}'}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(as_lists(value))


def divisors(n: int) -> list[int]:
    """All positive divisors of n in ascending order; none of 0. Takes sqrt(n) steps."""
    small = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def nearest(wanted: int, choices: Iterable[int]) -> list[int]:
    """The largest choice below `wanted` and the smallest above it, as far as they exist."""
    below = [n for n in choices if n < wanted]
    above = [n for n in choices if n > wanted]
    return ([max(below)] if below else []) + ([min(above)] if above else [])


def few(choices: list[int], wanted: int, most: int = 24) -> list[int]:
    """The `most` choices nearest to `wanted`, in ascending order, for a message."""
    return sorted(sorted(choices, key=lambda one: abs(one - wanted))[:most])


def _multiples_near(n: int, step: int) -> list[int]:
    """The largest multiple of `step` up to n and the one after it, without 0."""
    below = n // step * step
    return [multiple for multiple in (below, below + step) if multiple >= 1]


def _ramps_near(at: Layout, unit: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """The ramp with batches that are the nearest multiples of `unit` below, and above; those that do not grow are left
    out."""
    for round_to in (math.floor, math.ceil):
        ramp: list[tuple[int, int]] = []
        for size, steps in at.train.batch_ramp:
            size = max(1, round_to(size / unit)) * unit
            if size < at.train.global_batch and (not ramp or size > ramp[-1][0]):
                ramp.append((size, steps))
        yield tuple(ramp)
