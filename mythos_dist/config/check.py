"""What is wrong with a config: bounds of numbers, and settings that contradict each other; a line each."""

import math
from collections.abc import Iterator

from mythos_dist.config.layout import divisors, layout_problems
from mythos_dist.config.schema import BY_MODE, Config, DataConfig, MythosConfig

_AT_LEAST_ONE = {
    "model": "vocab_size dim n_heads n_kv_heads max_seq_len max_loop_iters kv_lora_rank q_lora_rank qk_nope_head_dim "
    "v_head_dim n_experts n_experts_per_tok expert_dim lora_rank max_output_tokens",
    "loops": "mean maximum backprop",
    "parallel": "tensor pipe expert",
    "train": "steps seq_len global_batch micro_batch recompute_every",
    "checkpoint": "every keep",
    "faults": "join_within hang_after lost_after roll_back_after",
}
_NOT_NEGATIVE = {
    "model": "prelude_layers coda_layers n_shared_experts",
    "experts": "bias_update_rate z_loss sequence_balance_loss",
    "act": "ponder_cost kl",
    "loops": "sigma curriculum_steps telemetry_every",
    "train": "eval_every eval_samples",
    "checkpoint": "pin_every",
    "optim": "lr warmup_steps weight_decay grad_clip",
    "data": "workers",
    "run": "seed",
    "faults": "clock_skew spike_factor max_rollbacks",
}


def _range_problems(name: str, section: object) -> Iterator[str]:
    for key in _AT_LEAST_ONE.get(name, "").split():
        value = getattr(section, key)
        if value is not None and value < 1:
            yield f"{name}.{key}={value} must be at least 1"
    for key in _NOT_NEGATIVE.get(name, "").split():
        if not getattr(section, key) >= 0:
            yield f"{name}.{key}={getattr(section, key)} must not be negative"


def model_problems(model: MythosConfig) -> list[str]:
    """What is wrong with a model by itself, a line each; empty when it can be built."""
    found = list(_range_problems("model", model))
    if found:
        return found  # the checks below divide by these numbers
    if model.attn_type == "gqa":
        if model.dim % model.n_heads:
            found.append(
                f"model.dim={model.dim} is not divisible by model.n_heads={model.n_heads}; "
                f"set model.n_heads to one of {divisors(model.dim)}"
            )
        if model.n_heads % model.n_kv_heads:
            found.append(
                f"model.n_heads={model.n_heads} is not divisible by model.n_kv_heads={model.n_kv_heads}; "
                f"set model.n_kv_heads to one of {divisors(model.n_heads)}"
            )
        if not found and model.head_dim % 2:
            found.append(
                f"model.dim / model.n_heads = {model.head_dim} is odd, and RoPE turns pairs of channels; "
                "choose model.dim and model.n_heads with an even ratio"
            )
    elif model.qk_rope_head_dim < 2 or model.qk_rope_head_dim % 2:
        found.append(
            f"model.qk_rope_head_dim={model.qk_rope_head_dim} must be even and at least 2: RoPE turns pairs of channels"
        )
    if model.n_experts_per_tok > model.n_experts:
        found.append(
            f"model.n_experts_per_tok={model.n_experts_per_tok} is more than model.n_experts={model.n_experts}; "
            f"set it to at most {model.n_experts}"
        )
    if not 0 < model.act_threshold <= 1:
        found.append(f"model.act_threshold={model.act_threshold} must be above 0 and at most 1")
    if not 0 <= model.dropout < 1:
        found.append(f"model.dropout={model.dropout} must be at least 0 and below 1")
    if model.mode == "reference":
        for key, wanted in BY_MODE["reference"].items():
            if getattr(model, key) != wanted:
                found.append(
                    f"model.{key}={getattr(model, key)} is not OpenMythos', as model.mode=reference wants it; "
                    "set model.mode=train"
                )
    if not model.rope_theta > 0:
        found.append(f"model.rope_theta={model.rope_theta} must be above 0")
    return found


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.mix is None:
        if not data.path:
            yield (
                "data.path is not set; give the folder of shards that tools/make_shards.py wrote, "
                "or several with weights, such as data.mix={shards/web: 0.7, shards/code: 0.3}"
            )
        return
    if data.path:
        yield f"data.path={data.path} and data.mix={data.mix} are both set; leave one of them out"
    if not data.mix:
        yield "data.mix={} names no folder; give some with their weights, such as {shards/web: 0.7, shards/code: 0.3}"
    total = sum(data.mix.values())
    for folder, weight in data.mix.items():
        if not 0 < weight < math.inf:
            yield f"data.mix[{folder}]={weight} must be above 0 and finite; leave the folder out to train without it"
        elif weight < total * 1e-9 < math.inf:
            yield f"data.mix[{folder}]={weight} is less than a billionth of all weights; leave the folder out"


def _act_problems(config: Config) -> Iterator[str]:
    act, mode = config.act, config.act.mode_of(config.model)
    if config.model.mode == "reference" and mode != "reference":
        yield f"act.mode={mode} does not go with model.mode=reference, which is OpenMythos'; set model.mode=train"
    if act.prior is not None and not 0 < act.prior < 1:
        yield f"act.prior={act.prior} is a probability to halt; set it between 0 and 1, or null for a uniform prior"
    for key in ("ponder_cost", "kl"):
        if mode == "off" and getattr(act, key) > 0:
            yield f"act.{key}={getattr(act, key)} weighs how tokens halt, and with act.mode=off none does; set act.mode"
    if mode != "ponder":
        return
    if config.loops.objective != "per_loop":
        yield (
            "act.mode=ponder weighs the losses of all loops; set loops.objective=per_loop, or act.mode to one of "
            "reference, safe, off"
        )
    if config.loops.backprop is not None:
        yield (
            f"loops.backprop={config.loops.backprop} leaves out loops that act.mode=ponder gives weight to; set "
            "loops.backprop=null, or act.mode to one of reference, safe, off"
        )


def _loops_problems(config: Config) -> Iterator[str]:
    loops, name = config.loops, config.loops.distribution
    if name == "uniform_set":
        if not loops.set:
            yield "loops.distribution=uniform_set needs loops.set, such as [1,2,4,8]"
        if loops.mean is not None:
            yield f"loops.mean={loops.mean} has no place beside loops.distribution=uniform_set; leave it out"
    elif loops.set:
        yield f"loops.set={list(loops.set)} is for loops.distribution=uniform_set, but that is {name}; leave one out"
    for key in ("set", "sweep"):
        if wrong := [n for n in getattr(loops, key) if n < 1]:
            yield f"loops.{key}={list(getattr(loops, key))} holds {wrong}; loops are counted from 1"
    if loops.curriculum != "none" and loops.curriculum_steps < 1:
        yield f"loops.curriculum={loops.curriculum} needs loops.curriculum_steps, the steps until it ends"
    if loops.per == "sequence" and name == "fixed":
        yield "loops.per=sequence draws a number for each sequence, and loops.distribution=fixed has one for all"
    if loops.per == "sequence" and config.model.lora == "per_loop":
        yield (
            "model.lora=per_loop has matrices for a loop, and with loops.per=sequence sequences are in different ones; "
            "set loops.per=step or model.lora=shared"
        )


def problems(config: Config) -> list[str]:
    """What is wrong with a config on any number of ranks, a line each."""
    found = model_problems(config.model)
    for name in ("experts", "act", "loops", "parallel", "train", "optim", "data", "checkpoint", "run"):
        found += _range_problems(name, getattr(config, name))
    train, optim, run = config.train, config.optim, config.run
    if train.seq_len > config.model.max_seq_len >= 1:
        found.append(
            f"train.seq_len={train.seq_len} is longer than the context model.max_seq_len={config.model.max_seq_len}; "
            f"set train.seq_len to at most {config.model.max_seq_len}, or model.max_seq_len to at least {train.seq_len}"
        )
    if train.micro_batch >= 1 and train.global_batch >= 1 and train.global_batch % train.micro_batch:
        found.append(
            f"train.global_batch={train.global_batch} is not divisible by train.micro_batch={train.micro_batch}; "
            f"set train.micro_batch to one of {divisors(train.global_batch)}"
        )
    if train.compile and config.parallel.zero == 3:
        found.append(
            "train.compile=true does not go with parallel.zero=3, which gathers parameters in hooks that no compiler "
            "sees; set train.compile=false, or parallel.zero to 1 or 2"
        )
    found += [*_act_problems(config), *_loops_problems(config)]
    found += layout_problems(config)
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optim, key) < 1:
            found.append(f"optim.{key}={getattr(optim, key)} must be at least 0 and below 1")
    if not 0 <= optim.min_lr_ratio <= 1:
        found.append(f"optim.min_lr_ratio={optim.min_lr_ratio} must lie between 0 and 1")
    if not optim.eps > 0:
        found.append(f"optim.eps={optim.eps} must be above 0")
    found += _data_problems(config.data)
    if negative := [step for step in config.checkpoint.pin if step < 1]:
        found.append(f"checkpoint.pin={list(config.checkpoint.pin)} names {negative}; steps are counted from 1")
    if not run.dir:
        found.append("run.dir is not set; give the folder that checkpoints and metrics go to")
    if run.peak_tflops is not None and not run.peak_tflops > 0:
        found.append(f"run.peak_tflops={run.peak_tflops} must be above 0, or null to find it out")
    return found
