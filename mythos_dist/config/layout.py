"""Which loops and layouts can work: rules as sentences, and for a broken rule the nearest values that mend it.

A sentence names the settings it is about, and a refusal is the sentence with their values put in. Remedies are tried
before they are named: whatever is proposed mends the line, and breaks nothing else wherever such a value is found.
The trap: a rule about a value that is refused already would talk nonsense. So all rules about replicas are silent while
ranks do not make whole ones; numbers below 1 do not get here (schema.py).
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mythos_dist.config.fields import kinds_of
from mythos_dist.config.schema import Config, LoopsConfig, MythosConfig, ParallelConfig, TrainConfig
from mythos_dist.units import count


@dataclass(frozen=True)
class Layout:
    """The sections that rules are about, and the number of ranks; while that is unknown (0), replicas are too."""

    model: MythosConfig
    loops: LoopsConfig
    parallel: ParallelConfig
    train: TrainConfig
    ranks: int = 0

    @property
    def mean_loops(self) -> int:
        return self.loops.mean_of(self.model)

    @property
    def ranks_per_replica(self) -> int:
        return self.parallel.pipe * self.parallel.tensor

    @property
    def replicas(self) -> int:
        """0 if ranks do not make whole ones."""
        if self.ranks % self.ranks_per_replica:
            return 0
        return self.ranks // self.ranks_per_replica

    @property
    def counted_replicas(self) -> str:
        return count(self.replicas, "replica")

    @property
    def counted_ranks(self) -> str:
        return count(self.ranks, "rank")

    @property
    def are(self) -> str:
        """The verb of the replicas."""
        return "is" if self.replicas == 1 else "are"

    @property
    def per_pass(self) -> int:
        """Sequences in one forward pass over all replicas."""
        return self.train.micro_batch * self.replicas


class Rule(NamedTuple):
    """Unless it `holds`, a layout is refused."""

    sentence: str  # what is wrong and why; values are put in behind the settings that it names
    holds: Callable[[Layout], bool]
    remedies: str  # what a user may change, the likeliest first


_RULES = (
    Rule(
        "loops.maximum is less than loops.mean: no step runs more than the maximum",
        lambda at: at.loops.maximum is None or at.loops.maximum >= at.mean_loops,
        "loops.maximum loops.mean",
    ),
    Rule(
        "loops.backprop is more than loops.mean, and a step with loops.distribution never runs more",
        lambda at: at.loops.distribution != "fixed" or (at.loops.backprop or 0) <= at.mean_loops,
        "loops.backprop",
    ),
    Rule(
        "train.recompute_every means nothing with train.recompute: only `loop` takes several loops at once",
        lambda at: at.train.recompute_every == 1 or at.train.recompute == "loop",
        "train.recompute train.recompute_every",
    ),
    Rule(
        "parallel.zero does not go with parallel.pipe: DeepSpeed's pipelines cannot shard gradients or parameters",
        lambda at: at.parallel.zero == 1 or at.parallel.pipe == 1,
        "parallel.zero parallel.pipe",
    ),
    Rule(
        "parallel.pipe is more than loops.mean + 2: all stages but the two at the ends must run a loop",
        lambda at: at.parallel.pipe <= at.mean_loops + 2,
        "parallel.pipe",
    ),
    Rule(
        "model.n_experts is not divisible by parallel.expert: each of the ranks that share experts holds equally many",
        lambda at: at.model.n_experts % at.parallel.expert == 0,
        "parallel.expert",
    ),
    Rule(
        "model.n_heads is not divisible by parallel.tensor: a tensor rank works on whole heads, equally many",
        lambda at: at.model.n_heads % at.parallel.tensor == 0,
        "parallel.tensor",
    ),
    Rule(
        "model.dim is not divisible by parallel.tensor: with parallel.expert, rows travel in as many equal slices",
        lambda at: at.parallel.expert == 1 or at.model.dim % at.parallel.tensor == 0,
        "parallel.tensor parallel.expert",
    ),
    Rule(
        "train.seq_len is not divisible by parallel.tensor: parallel.sequence gives tensor ranks equal parts of it",
        lambda at: not at.parallel.sequence or at.train.seq_len % at.parallel.tensor == 0,
        "train.seq_len parallel.tensor parallel.sequence",
    ),
)
_RANK_RULES = (
    Rule(
        "the number of ranks, {at.ranks}, is not divisible by parallel.pipe x parallel.tensor = "
        "{at.ranks_per_replica}: so many hold one replica",
        lambda at: at.ranks % at.ranks_per_replica == 0,
        "parallel.tensor parallel.pipe ranks",
    ),
    Rule(
        "{at.counted_replicas} ({at.counted_ranks} / parallel.pipe / parallel.tensor) {at.are} not divisible by "
        "parallel.expert: so many replicas share one copy of the experts",
        lambda at: at.replicas % at.parallel.expert == 0,
        "parallel.expert ranks",
    ),
    Rule(
        "train.global_batch is not divisible by train.micro_batch x {at.counted_replicas} = {at.per_pass}: "
        "every replica runs equally many passes",
        lambda at: not at.replicas or at.train.global_batch % at.per_pass == 0,
        "train.micro_batch train.global_batch",
    ),
)

# What a setting may be changed to, as far as can be said without trying.
_CHOICES: dict[str, Callable[[Layout], Iterable[Any]]] = {
    "loops.maximum": lambda at: [at.mean_loops],
    "loops.mean": lambda at: [at.loops.maximum],
    "loops.backprop": lambda at: [at.mean_loops],
    "train.recompute": lambda at: ["loop"],
    "train.recompute_every": lambda at: [1],
    "train.seq_len": lambda at: [n for n in _around(at.train.seq_len, at.parallel.tensor) if n <= at.model.max_seq_len],
    "train.micro_batch": lambda at: divisors(at.train.global_batch),
    "train.global_batch": lambda at: _around(at.train.global_batch, at.per_pass),
    "parallel.zero": lambda at: [1],
    # Any number up to mean + 2, and where ranks are known those that divide them.
    "parallel.pipe": lambda at: [n for n in {1, at.mean_loops + 2, *divisors(at.ranks)} if n <= at.mean_loops + 2],
    "parallel.expert": lambda at: divisors(at.model.n_experts),
    "parallel.tensor": lambda at: divisors(at.model.n_heads),
    "parallel.sequence": lambda at: [False],
    # Numbers that the batch can be dealt to, and in case none of them suits the experts, numbers that do.
    "ranks": lambda at: (
        [at.ranks_per_replica * n for n in divisors(at.train.global_batch // at.train.micro_batch)]
        + _around(at.ranks, at.ranks_per_replica * at.parallel.expert)
    ),
}


def divisors(n: int) -> list[int]:
    """All positive divisors of n, in order; none of 0. Takes sqrt(n) steps."""
    small = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def nearest(wanted: int, working: Iterable[int]) -> list[int]:
    """The closest of `working` below `wanted` and the closest above it, as far as there are any."""
    working = sorted(working)
    return [n for n in working if n < wanted][-1:] + [n for n in working if n > wanted][:1]


def few(values: list[int], wanted: int, most: int = 24) -> list[int]:
    """For a message: all values, or of many the nearest to `wanted`."""
    return values if len(values) <= most else sorted(sorted(values, key=lambda one: abs(one - wanted))[:most])


def layout_problems(config: Config, world_size: int = 0) -> list[str]:
    """What is wrong with a layout on `world_size` ranks but would not be on others, a line each.

    Without a number of ranks: what is wrong on any. `problems` has those lines among its own.
    """
    at = Layout(config.model, config.loops, config.parallel, config.train, world_size)
    refused = _broken(at)
    return [_line(rule, at, refused) for rule in refused if rule in (_RANK_RULES if world_size else _RULES)]


def works(config: Config, world_size: int) -> bool:
    """Whether `layout_problems` has none, for who asks thousands of times."""
    at = Layout(config.model, config.loops, config.parallel, config.train, world_size)
    return all(rule.holds(at) for rule in _RULES + _RANK_RULES)


def _broken(at: Layout) -> list[Rule]:
    return [rule for rule in _RULES + _RANK_RULES if not rule.holds(at)]


_SETTING = re.compile(r"\b(?:model|loops|parallel|train)\.\w+")


def _line(rule: Rule, at: Layout, refused: list[Rule]) -> str:
    """The refusal with its remedies. Those that leave another rule broken that was not come last and say so."""
    alone, with_others = [], []
    for path in rule.remedies.split():
        tried = {value: _changed(at, path, value) for value in _CHOICES[path](at) if _in_range(at, path, value)}
        mending = {value: after for value, after in tried.items() if rule.holds(after)}
        clean = [value for value, after in mending.items() if all(other in refused for other in _broken(after))]
        if clean:
            alone.append(_remedy(path, _value(at, path), clean))
        elif mending:
            with_others.append("with further changes " + _remedy(path, _value(at, path), list(mending)))
    said = _SETTING.sub(lambda found: _named(at, found[0]), rule.sentence.format(at=at))
    remedies = ", or ".join(alone + with_others)
    return f"{said}; {remedies}" if remedies else said


def _remedy(path: str, value: Any, choices: list[Any]) -> str:
    if isinstance(value, int) and path != "train.micro_batch":  # of those all: which one is best depends on memory
        choices = nearest(value, choices)
    elif isinstance(value, int):
        choices = few(choices, value)
    name = "the number of ranks" if path == "ranks" else path
    return f"set {name} to {_yaml(choices[0]) if len(choices) == 1 else f'one of {choices}'}"


def _value(at: Layout, path: str) -> Any:
    if path == "ranks":
        return at.ranks
    section, _, key = path.partition(".")
    return at.mean_loops if path == "loops.mean" else getattr(getattr(at, section), key)


def _in_range(at: Layout, path: str, value: Any) -> bool:
    section, _, key = path.partition(".")
    return path == "ranks" or kinds_of(type(getattr(at, section)))[key].problem(value) is None


def _changed(at: Layout, path: str, value: Any) -> Layout:
    if path == "ranks":
        return replace(at, ranks=value)
    section, _, key = path.partition(".")
    return replace(at, **{section: replace(getattr(at, section), **{key: value})})


def _named(at: Layout, path: str) -> str:
    """A setting with its value; an unset mean also with the setting that stands in for it."""
    if path == "loops.mean" and at.loops.mean is None:
        return f"loops.mean=null (model.max_loop_iters={at.model.max_loop_iters})"
    return f"{path}={_yaml(_value(at, path))}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _around(n: int, step: int) -> list[int]:
    """The multiples of `step` next to n: one at most that is not above it, and the first that is. None is below 1."""
    below = n // max(step, 1) * step
    return [multiple for multiple in (below, below + step) if multiple >= 1]
