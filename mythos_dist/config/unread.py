"""Settings that were changed, but that other settings prevent from being read, or from being reached.

Rule: they are not errors. A config that others build on may set them, and a command line may turn off what they belong
to. But a user who sets one expects an effect, so a start says it once. What cannot be meant is refused (rules.py).
Widths of the model are not in the table: presets set those of both kinds of attention.

Decisions: CONFIG-4.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mythos_dist.config.fields import show
from mythos_dist.config.schema import Config
from mythos_dist.units import count
from mythos_dist.urls import is_url


class Condition(NamedTuple):
    """When some settings are read."""

    settings: tuple[str, ...]
    holds: Callable[[Config], bool]
    otherwise: Callable[[Config], str]  # continues `SETTING=VALUE `


def _no_effect_with(setting: str) -> Callable[[Config], str]:
    return lambda config: f"has no effect with {setting}={_shown(value_of(config, setting))}"


def _ramp_steps(config: Config) -> int:
    return sum(steps for _, steps in config.train.batch_ramp)


CONDITIONS = (
    Condition(("experts.bias_update_rate",), lambda at: at.model.mode == "train", _no_effect_with("model.mode")),
    Condition(("act.prior",), lambda at: at.act.kl > 0, _no_effect_with("act.kl")),
    Condition(("loops.maximum",), lambda at: at.loops.distribution != "fixed", _no_effect_with("loops.distribution")),
    Condition(
        ("loops.sigma",),
        lambda at: at.loops.distribution == "lognormal_poisson",
        _no_effect_with("loops.distribution"),
    ),
    Condition(
        ("loops.curriculum_steps",), lambda at: at.loops.curriculum != "none", _no_effect_with("loops.curriculum")
    ),
    Condition(
        ("loops.curriculum_steps",),
        lambda at: at.loops.curriculum == "none" or at.loops.curriculum_steps <= at.train.steps,
        lambda at: f"is more than train.steps={at.train.steps}: the curriculum does not end",
    ),
    Condition(
        ("train.eval_every", "loops.sweep", "average.evaluate"),
        lambda at: at.train.eval_samples > 0,
        _no_effect_with("train.eval_samples"),
    ),
    Condition(("parallel.sequence",), lambda at: at.parallel.tensor > 1, _no_effect_with("parallel.tensor")),
    Condition(
        ("train.batch_ramp",),
        lambda at: _ramp_steps(at) < at.train.steps,
        lambda at: (
            f"takes {count(_ramp_steps(at), 'step')}, and train.steps={at.train.steps}: "
            f"train.global_batch={at.train.global_batch} is not reached"
        ),
    ),
    Condition(
        ("optim.muon_momentum", "optim.muon_nesterov", "optim.muon_ns_steps"),
        lambda at: at.optim.name == "muon",
        _no_effect_with("optim.name"),
    ),
    Condition(("optim.min_lr_ratio",), lambda at: at.optim.schedule != "constant", _no_effect_with("optim.schedule")),
    Condition(
        ("optim.warmup_steps",),
        lambda at: at.optim.warmup_steps <= at.train.steps,
        lambda at: f"is more than train.steps={at.train.steps}: the learning rate does not reach optim.lr",
    ),
    Condition(("average.every",), lambda at: at.average.kind != "off", _no_effect_with("average.kind")),
    Condition(("average.last",), lambda at: at.average.kind == "mean", _no_effect_with("average.kind")),
    Condition(("average.decay",), lambda at: at.average.kind == "ema", _no_effect_with("average.kind")),
    Condition(
        ("data.cache_limit", "data.prefetch_shards"),
        lambda at: any(map(is_url, at.data.folders)),
        lambda at: "has no effect on shards in local folders: they are read where they are",
    ),
    Condition(
        ("checkpoint.remote_backlog", "checkpoint.remote_wait", "checkpoint.remote_wait_stopped"),
        lambda at: at.checkpoint.remote is not None,
        _no_effect_with("checkpoint.remote"),
    ),
    Condition(
        ("run.project", "run.group", "run.tags"), lambda at: at.run.wandb != "disabled", _no_effect_with("run.wandb")
    ),
    Condition(
        ("run.profile",),
        lambda at: at.run.profile is None or at.run.profile.steps[0] <= at.end,
        lambda at: f"begins after the last step, {at.end}",
    ),
    Condition(("faults.clock_skew",), lambda at: at.faults.preflight, _no_effect_with("faults.preflight")),
)


def unread_settings(stages: Sequence[Config]) -> list[str]:
    """A sentence for each setting that differs from its default, but not in a stage where it is read."""
    notes = []
    for condition in CONDITIONS:
        for setting in condition.settings:
            changed = [config for config in stages if value_of(config, setting) != value_of(Config(), setting)]
            if changed and not any(map(condition.holds, changed)):
                value = _shown(value_of(changed[0], setting))
                notes.append(f"{setting}={value} {condition.otherwise(changed[0])}")
    return notes


def value_of(config: Config, setting: str) -> Any:
    """The value of a setting such as "train.steps"."""
    section, _, key = setting.partition(".")
    return getattr(getattr(config, section), key)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else show(value)
