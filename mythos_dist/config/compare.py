"""Which settings may change when a run resumes, and how two configs differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from mythos_dist.config.fields import Section, as_lists
from mythos_dist.config.schema import Config

# None of these changes the results up to the step where a run stopped, except for the order of sums.
MAY_CHANGE = {
    "train.steps",
    "train.eval_every",
    "train.eval_samples",
    "train.tasks",
    "train.tasks_every",
    "train.attention",
    "train.compile",
    "train.recompute",
    "train.recompute_every",
    "train.chunk_tokens",
    "train.offload",
    "train.micro_batch",
    "experts.backend",
    "loops.telemetry_every",
    "loops.sweep",
    "data.path",  # folders may move: the fingerprint of shards and weights is checked instead
    "data.mix",
    "data.mix_end",
    "data.mix_samples",
    "data.tokenizer",
    "data.workers",
    "data.verify",
    "data.cache",
    "data.cache_limit",
    "data.prefetch_shards",
    "run.dir",
    "run.start_from",  # not read again once the run has a checkpoint
    "run.start_from_state",
    "run.wandb",
    "run.project",
    "run.group",
    "run.tags",
    "run.tensorboard",
    "run.peak_tflops",
    "run.count_communication",
    "run.max_seconds",
    "run.cluster",
    "run.check_memory",
    "run.report",
    "run.profile",
}
_MAY_CHANGE_SECTIONS = {"average", "parallel", "checkpoint", "faults"}


# What settings were, by section, before they existed: with another value a run would have other results.
_ADDED: dict[str, dict[str, Any]] = {
    "train": {"batch_ramp": ()},
    "model": {
        "kv_sharing": "all",
        "rope_scaling": None,
        "residual_scale": "init",
        "state_norm": False,
        "loop_layers": 1,
        "norm_eps": 1e-6,
        "dense_dim": 0,
        "gqa_head_dim": 0,
        "qkv_bias": False,
        "key_norm_weight": False,
        "tie_embeddings": True,
    },
    "loops": {"fixed_point": 0.0},
}
# Settings of the model that names and shapes of its tensors depend on: no stage may change them.
WIDTHS = (
    "vocab_size dim n_heads n_kv_heads max_loop_iters prelude_layers coda_layers attn_type kv_lora_rank q_lora_rank "
    "qk_rope_head_dim qk_nope_head_dim v_head_dim n_experts n_shared_experts n_experts_per_tok expert_dim lora_rank "
    "lora injection qk_norm loop_layers dense_dim tie_embeddings gqa_head_dim qkv_bias key_norm_weight"
).split()
# What a new stage may change; the others say where a run is, and how it is watched.
_TRAINING = ("model", "experts", "act", "loops", "train", "optim", "average", "data", "parallel")


def training_changes(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Any, Any]]:
    """(setting, its value before, its value now) for each that both have and that differs; lists equal tuples.

    What `before` is missing of `_ADDED` had the value there."""
    for section in _TRAINING:
        settings = before.get(section, {})
        for key, old in {**(_ADDED.get(section, {}) if settings else {}), **settings}.items():
            old, new = as_lists(old), as_lists(now.get(section, {}).get(key, old))
            if new != old:
                yield f"{section}.{key}", old, new


def differences(
    before: Mapping[str, Mapping[str, Any]], now: Config, complete: bool = True
) -> Iterator[tuple[str, Any, Any]]:
    """(setting, its value before, its value now) for each that changed and must not; settings missing in `before`
    are not compared, except, with `complete`, those of `_ADDED`. Lists equal tuples, since `before` may come from
    JSON."""
    for section, values in before.items():
        for key, old in {**(_ADDED.get(section, {}) if complete else {}), **values}.items():
            name = f"{section}.{key}"
            # In a later stage it has decided how steps are counted.
            fixed = name == "run.start_from_state" and now.run.stage_begin > 0
            if section in _MAY_CHANGE_SECTIONS or (name in MAY_CHANGE and not fixed):
                continue
            value = getattr(getattr(now, section, None), key, None)
            if as_lists(value) != as_lists(old):
                yield name, _given(old), _given(value)


def _given(value: Any) -> Any:
    """A value for a message: of settings inside a setting, those that are set."""
    if isinstance(value, Section | dict):
        return {key: one for key, one in as_lists(value).items() if one is not None}
    return value
