"""Settings that contradict each other, a line each. What one setting may be, its type and range say (schema.py)."""

from collections.abc import Iterator

from mythos_dist.config.layout import divisors, few, layout_problems
from mythos_dist.config.schema import BY_MODE, Config, DataConfig, MythosConfig


def model_problems(model: MythosConfig) -> list[str]:
    """What is wrong with a model by itself, a line each; empty when it can be built."""
    found: list[str] = []
    if model.attn_type == "gqa":
        if model.dim % model.n_heads:
            found.append(
                f"model.dim={model.dim} is not divisible by model.n_heads={model.n_heads}; "
                f"set model.n_heads to one of {few(divisors(model.dim), model.n_heads)}"
            )
        if model.n_heads % model.n_kv_heads:
            found.append(
                f"model.n_heads={model.n_heads} is not divisible by model.n_kv_heads={model.n_kv_heads}; "
                f"set model.n_kv_heads to one of {few(divisors(model.n_heads), model.n_kv_heads)}"
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
    if model.mode == "reference":
        for key, wanted in BY_MODE["reference"].items():
            if getattr(model, key) != wanted:
                found.append(
                    f"model.{key}={getattr(model, key)} is not OpenMythos', as model.mode=reference wants it; "
                    "set model.mode=train"
                )
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
        if weight < total * 1e-9:
            yield f"data.mix[{folder}]={weight} is less than a billionth of all weights; leave the folder out"


def _act_problems(config: Config) -> Iterator[str]:
    act, mode = config.act, config.act.mode_of(config.model)
    if config.model.mode == "reference" and mode != "reference":
        yield f"act.mode={mode} does not go with model.mode=reference, which is OpenMythos'; set model.mode=train"
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
            yield (
                f"loops.mean={loops.mean} has no place beside loops.distribution=uniform_set; "
                "leave it out, or set loops.mean=null"
            )
    elif loops.set:
        yield (
            f"loops.set={list(loops.set)} is for loops.distribution=uniform_set, but that is {name}; "
            "leave one out, or set loops.set=null"
        )
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
    train = config.train
    if train.seq_len > config.model.max_seq_len:
        found.append(
            f"train.seq_len={train.seq_len} is longer than the context model.max_seq_len={config.model.max_seq_len}; "
            f"set train.seq_len to at most {config.model.max_seq_len}, or model.max_seq_len to at least {train.seq_len}"
        )
    if train.global_batch % train.micro_batch:
        found.append(
            f"train.global_batch={train.global_batch} is not divisible by train.micro_batch={train.micro_batch}; "
            f"set train.micro_batch to one of {few(divisors(train.global_batch), train.micro_batch)}"
        )
    if train.compile and config.parallel.zero == 3:
        found.append(
            "train.compile=true does not go with parallel.zero=3, which gathers parameters in hooks that no compiler "
            "sees; set train.compile=false, or parallel.zero to 1 or 2"
        )
    found += [*_act_problems(config), *_loops_problems(config)]
    found += layout_problems(config)
    found += _data_problems(config.data)
    if not config.run.dir:
        found.append("run.dir is not set; give the folder that checkpoints and metrics go to")
    return found
