"""Rules between settings that are valid each by itself (schema.py).

Those that depend on the number of ranks, and those whose remedies are tried before they are proposed, are in layout.py.

Decisions: LOOPS-10.
"""

from collections.abc import Iterator, Set

from mythos_dist.config.layout import Problem, divisors, few, find_layout_problems
from mythos_dist.config.rope_rules import rope_problems
from mythos_dist.config.schema import BY_MODE, CheckpointConfig, Config, DataConfig, MythosConfig, OptimConfig
from mythos_dist.errors import redact
from mythos_dist.urls import has_secrets, is_url, scheme_of

_WRITABLE = ("s3", "file")  # as in store/write.py


def problems(config: Config, refused: Set[str] = frozenset()) -> list[str]:
    """What is wrong with a config on any number of ranks, a line each, except what concerns `refused` settings."""
    broken = [
        *_model_problems(config.model),
        *_train_problems(config),
        *_schedule_problems(config),
        *_optim_problems(config.optim),
        *_average_problems(config),
        *_act_problems(config),
        *_loops_problems(config),
        *_kv_sharing_problems(config),
        *find_layout_problems(config),
        *_data_problems(config.data),
        *_remote_problems(config.checkpoint),
        *_run_problems(config),
        *_local_path_problems(config),
    ]
    return [problem.message for problem in broken if refused.isdisjoint(problem.settings)]


def model_problems(model: MythosConfig) -> list[str]:
    """What is wrong with a model by itself, a line each."""
    return [problem.message for problem in _model_problems(model)]


def _model_problems(model: MythosConfig) -> Iterator[Problem]:
    if model.attn_type == "gqa":
        yield from _gqa_problems(model)
    else:
        yield from _mla_problems(model)
    if model.n_experts_per_tok > model.n_experts:
        yield Problem(
            ("model.n_experts_per_tok", "model.n_experts"),
            f"model.n_experts_per_tok={model.n_experts_per_tok} is more than model.n_experts={model.n_experts}; "
            f"set it to at most {model.n_experts}",
        )
    if model.injection in ("none", "difference") and model.initial_state != "e":
        yield Problem(
            ("model.injection", "model.initial_state"),
            f"model.initial_state={model.initial_state} with model.injection={model.injection}: no loop would get the "
            "prelude's output; set model.initial_state=e, or leave it out",
        )
    if model.rope_scaling is not None:
        yield from rope_problems(model, model.rope_scaling)
    if model.mode == "reference":
        for key, wanted in BY_MODE["reference"].items():
            if getattr(model, key) != wanted:
                yield Problem(
                    (f"model.{key}", "model.mode"),
                    f"model.{key}={getattr(model, key)} is not OpenMythos', which model.mode=reference requires; "
                    "set model.mode=train",
                )


def _divisibility(setting: str, value: int, by: str, divisor: int) -> Iterator[Problem]:
    if value % divisor:
        yield Problem(
            (setting, by),
            f"{setting}={value} is not divisible by {by}={divisor}; set {by} to one of {few(divisors(value), divisor)}",
        )


def _gqa_problems(model: MythosConfig) -> Iterator[Problem]:
    dim, heads, kv_heads = model.dim, model.n_heads, model.n_kv_heads
    if not model.gqa_head_dim:
        yield from _divisibility("model.dim", dim, "model.n_heads", heads)
    yield from _divisibility("model.n_heads", heads, "model.n_kv_heads", kv_heads)
    if model.key_norm_weight and not model.qk_norm:
        yield Problem(
            ("model.key_norm_weight", "model.qk_norm"),
            "model.key_norm_weight=true, but model.qk_norm=false: keys are not normalized; set model.qk_norm=true",
        )
    if model.gqa_head_dim:
        if model.gqa_head_dim % 2:
            yield Problem(
                ("model.gqa_head_dim",),
                f"model.gqa_head_dim={model.gqa_head_dim} is odd, and RoPE rotates pairs of channels; set an even one",
            )
    elif dim % heads == 0 and heads % kv_heads == 0 and model.head_dim % 2:
        yield Problem(
            ("model.dim", "model.n_heads"),
            f"model.dim / model.n_heads = {model.head_dim} is odd, and RoPE rotates pairs of channels; "
            "choose model.dim and model.n_heads with an even ratio",
        )


def _mla_problems(model: MythosConfig) -> Iterator[Problem]:
    if model.qk_rope_head_dim < 2 or model.qk_rope_head_dim % 2:
        yield Problem(
            ("model.qk_rope_head_dim",),
            f"model.qk_rope_head_dim={model.qk_rope_head_dim} must be even and at least 2: RoPE rotates pairs of "
            "channels",
        )
    for key in ("gqa_head_dim", "qkv_bias", "key_norm_weight"):
        if value := getattr(model, key):
            yield Problem(
                (f"model.{key}", "model.attn_type"),
                f"model.{key}={str(value).lower()} is a setting of GQA, but model.attn_type=mla; leave it out, or set "
                "model.attn_type=gqa",
            )


def _train_problems(config: Config) -> Iterator[Problem]:
    train, longest = config.train, config.model.max_seq_len
    if train.seq_len > longest:
        yield Problem(
            ("train.seq_len", "model.max_seq_len"),
            f"train.seq_len={train.seq_len} is longer than the context model.max_seq_len={longest}; "
            f"set train.seq_len to at most {longest}, or model.max_seq_len to at least {train.seq_len}",
        )
    yield from _divisibility("train.global_batch", train.global_batch, "train.micro_batch", train.micro_batch)
    if train.compile and config.parallel.zero == 3:
        yield Problem(
            ("train.compile", "parallel.zero"),
            "train.compile=true does not work with parallel.zero=3, which gathers parameters in hooks that "
            "torch.compile does not trace; set train.compile=false, or parallel.zero to 1 or 2",
        )
    if train.tasks_every and not train.tasks:
        yield Problem(
            ("train.tasks_every", "train.tasks"),
            f"train.tasks_every={train.tasks_every} has no effect without train.tasks; set train.tasks to a list such "
            "as [task.yaml], or train.tasks_every=0",
        )


def _schedule_problems(config: Config) -> Iterator[Problem]:
    optim, steps = config.optim, config.train.steps
    if optim.decay != "linear" and optim.schedule != "wsd":
        yield Problem(
            ("optim.decay", "optim.schedule"),
            f"optim.decay={optim.decay} is the shape of wsd's decay, but optim.schedule={optim.schedule}; "
            "set optim.schedule=wsd, or leave optim.decay out",
        )
    if optim.decay_steps is None:
        return
    if optim.schedule in ("constant", "inverse_sqrt"):
        yield Problem(
            ("optim.decay_steps", "optim.schedule"),
            f"optim.decay_steps={optim.decay_steps} does not work with optim.schedule={optim.schedule}, which has no "
            "decay of a set length; leave it out, or set optim.schedule to one of cosine, linear, wsd",
        )
    elif optim.warmup_steps + optim.decay_steps > steps:
        longest = steps - optim.warmup_steps
        lower = f"set optim.decay_steps to at most {longest}" if longest > 0 else "lower optim.warmup_steps"
        yield Problem(
            ("optim.decay_steps", "optim.warmup_steps", "train.steps"),
            f"optim.decay_steps={optim.decay_steps} after optim.warmup_steps={optim.warmup_steps} is longer than "
            f"train.steps={steps}; {lower}, or raise train.steps",
        )


def _optim_problems(optim: OptimConfig) -> Iterator[Problem]:
    if optim.name != "muon" and optim.muon_lr is not None:
        yield Problem(
            ("optim.muon_lr", "optim.name"),
            f"optim.muon_lr={optim.muon_lr} has no effect with optim.name={optim.name}; set optim.name=muon, or "
            "optim.muon_lr=null",
        )


def _average_problems(config: Config) -> Iterator[Problem]:
    average, steps = config.average, config.train.steps
    if average.kind == "off":
        if average.evaluate:
            message = "average.evaluate=true, but average.kind=off; set average.kind to mean or ema"
            yield Problem(("average.evaluate", "average.kind"), message)
        return
    if average.steps <= steps:
        return
    if average.kind == "mean" and average.last and average.every <= steps:
        yield Problem(
            ("average.last", "average.every", "train.steps"),
            f"average.last={average.last} snapshots, one in average.every={average.every} steps, take {average.steps} "
            f"steps, more than train.steps={steps}; set average.last to at most {steps // average.every}, or lower "
            "average.every",
        )
    else:
        yield Problem(
            ("average.every", "train.steps"),
            f"average.every={average.every} is more than train.steps={steps}, so no snapshot would be taken; "
            f"set it to at most {steps}",
        )


def _act_problems(config: Config) -> Iterator[Problem]:
    act, mode = config.act, config.act.mode_of(config.model)
    if config.model.mode == "reference" and mode != "reference":
        yield Problem(
            ("act.mode", "model.mode"),
            f"act.mode={mode} does not work with model.mode=reference, which is OpenMythos'; set model.mode=train",
        )
    for key in ("ponder_cost", "kl"):
        if mode == "off" and getattr(act, key) > 0:
            yield Problem(
                (f"act.{key}", "act.mode"),
                f"act.{key}={getattr(act, key)} is a loss on halting probabilities, and act.mode=off has none; "
                "set act.mode",
            )
    if mode != "ponder":
        return
    if config.loops.objective != "per_loop":
        yield Problem(
            ("act.mode", "loops.objective"),
            "act.mode=ponder weights the losses of all loops; set loops.objective=per_loop, or act.mode to one of "
            "reference, safe, off",
        )
    if config.loops.backprop is not None:
        yield Problem(
            ("loops.backprop", "act.mode"),
            f"loops.backprop={config.loops.backprop} gives no gradient to loops that act.mode=ponder weights; set "
            "loops.backprop=null, or act.mode to one of reference, safe, off",
        )


def _loops_problems(config: Config) -> Iterator[Problem]:
    loops, name = config.loops, config.loops.distribution
    if name == "uniform_set" and not loops.set:
        yield Problem(
            ("loops.distribution", "loops.set"), "loops.distribution=uniform_set needs loops.set, such as [1,2,4,8]"
        )
    if name == "uniform_set" and loops.mean is not None:
        yield Problem(
            ("loops.mean", "loops.distribution"),
            f"loops.mean={loops.mean} does not work with loops.distribution=uniform_set, whose mean is that of "
            "loops.set; leave it out, or set loops.mean=null",
        )
    if name != "uniform_set" and loops.set:
        yield Problem(
            ("loops.set", "loops.distribution"),
            f"loops.set={list(loops.set)} is for loops.distribution=uniform_set, but that is {name}; "
            "leave one out, or set loops.set=null",
        )
    if loops.teacher and loops.objective != "per_loop":
        yield Problem(
            ("loops.teacher", "loops.objective"),
            f"loops.teacher={loops.teacher} teaches the losses of earlier loops, and loops.objective="
            f"{loops.objective} has none; set loops.objective=per_loop, or loops.teacher=0",
        )
    if config.model.injection == "none" and loops.backprop is not None:
        yield Problem(
            ("loops.backprop", "model.injection"),
            f"loops.backprop={loops.backprop} with model.injection=none: only the first loop gets the prelude's "
            "output, and without its gradient nothing would train the prelude; set loops.backprop=null, or another "
            "injection",
        )
    if loops.fixed_point and loops.most_of(config.model) == 1:
        yield Problem(
            ("loops.fixed_point", "loops.mean"),
            f"loops.fixed_point={loops.fixed_point} has no effect with one loop, which begins with the initial state; "
            "set loops.mean to at least 2, or loops.fixed_point=0",
        )
    if loops.curriculum != "none" and loops.curriculum_steps < 1:
        yield Problem(
            ("loops.curriculum", "loops.curriculum_steps"),
            f"loops.curriculum={loops.curriculum} needs loops.curriculum_steps, the number of steps until it ends",
        )
    if loops.per == "sequence" and name == "fixed":
        yield Problem(
            ("loops.per", "loops.distribution"),
            "loops.per=sequence draws a number for each sequence, but loops.distribution=fixed draws none",
        )
    if loops.per == "sequence" and config.model.lora == "per_loop":
        yield Problem(
            ("model.lora", "loops.per"),
            "model.lora=per_loop has matrices per loop index, and with loops.per=sequence the sequences of a batch "
            "are at different ones; set loops.per=step or model.lora=shared",
        )


def _kv_sharing_problems(config: Config) -> Iterator[Problem]:
    loops, model = config.loops, config.model
    needed = min(model.kv_loops, loops.most_of(model))
    if loops.backprop is not None and loops.backprop < needed:
        yield Problem(
            ("loops.backprop", "model.kv_sharing"),
            f"loops.backprop={loops.backprop} with model.kv_sharing={model.kv_sharing}: in some steps no loop with "
            f"gradient computes keys and values; set loops.backprop to null or at least {needed}, or "
            "model.kv_sharing=all",
        )


def _data_problems(data: DataConfig) -> Iterator[Problem]:
    settings = ("data.path", "data.mix")
    yield from _mix_change_problems(data)
    yield from _url_problems(data)
    if data.mix is None:
        if not data.path:
            yield Problem(
                settings,
                "data.path is not set; give the folder of shards that `mythos shards` wrote, "
                "or several with weights, such as data.mix={shards/web: 0.7, shards/code: 0.3}",
            )
        return
    if data.path:
        yield Problem(settings, f"data.path={data.path} and data.mix={data.mix} are both set; leave one of them out")
    if not data.mix:
        yield Problem(
            settings,
            "data.mix={} names no folder; give some with their weights, such as {shards/web: 0.7, shards/code: 0.3}",
        )
    for name, mix in (("data.mix", data.mix), ("data.mix_end", data.mix_end or {})):
        total = sum(mix.values())
        for folder, weight in mix.items():
            if weight < total * 1e-9:
                message = f"{name}[{folder}]={weight} is less than a billionth of all weights; leave the folder out"
                yield Problem((*settings, name), message)


def _url_problems(data: DataConfig) -> Iterator[Problem]:
    """Settings are written to config.yaml and logs, so URLs must not hold what gives access."""
    for url in [*data.mix_begin, *(data.mix_end or {}), data.tokenizer or ""]:
        if is_url(url) and has_secrets(url):
            yield Problem(("data.path", "data.mix", "data.tokenizer"), _secret_in(url))


def _secret_in(url: str) -> str:
    return (
        f"{redact(url)} contains a password or key; leave it out, and give credentials in the environment or in the "
        "store's usual files"
    )


def _remote_problems(settings: CheckpointConfig) -> Iterator[Problem]:
    name, url = "checkpoint.remote", settings.remote
    if url is None:
        if settings.remote_keep is not None:
            text = f"checkpoint.remote_keep={settings.remote_keep} needs {name}, the URL of a folder; set both, or none"
            yield Problem((name, "checkpoint.remote_keep"), text)
    elif not is_url(url) or scheme_of(url) not in _WRITABLE or not url.partition("://")[2].strip("/"):
        yield Problem(
            (name,),
            f"{name}={redact(url)} is not the URL of a folder that is written; give one such as s3://bucket/run (also "
            "of other stores, with AWS_ENDPOINT_URL), or file:///mount/run",
        )
    elif has_secrets(url):
        yield Problem((name,), f"{name}: {_secret_in(url)}")


def _mix_change_problems(data: DataConfig) -> Iterator[Problem]:
    settings = ("data.mix", "data.mix_end", "data.mix_samples")
    if data.mix_end is None and data.mix_samples is None:
        return
    if data.mix_end is None or data.mix_samples is None:
        given, missing = ("mix_end", "mix_samples") if data.mix_samples is None else ("mix_samples", "mix_end")
        yield Problem(settings, f"data.{given} is set, but data.{missing} is not; set both, or none")
        return
    if data.mix is None:
        yield Problem(settings, "data.mix_end is set, but data.mix, the weights at the beginning, is not; set it")
    if not data.mix_end:
        yield Problem(settings, "data.mix_end={} names no folder; give some with their weights, or leave it out")
    begin, end = data.mix_samples
    if begin > end:
        yield Problem(settings, f"data.mix_samples={[begin, end]} ends before it begins; set it to {[end, begin]}")


def _local_path_problems(config: Config) -> Iterator[Problem]:
    """URLs in settings of local paths: Path("s3://bucket/run") is the local folder s3:/bucket/run."""
    for name, path in (
        ("run.dir", config.run.dir),
        ("run.cluster", config.run.cluster),
        ("data.cache", config.data.cache),
        ("checkpoint.key_file", config.checkpoint.key_file),
    ):
        if path and is_url(path):
            store = ", and the URL as checkpoint.remote for copies in a store" if name == "run.dir" else ""
            yield Problem((name,), f"{name}={redact(path)} is a URL, but must be a local path; give one{store}")


def _run_problems(config: Config) -> Iterator[Problem]:
    if not config.run.dir:
        message = "run.dir is not set; give the folder that checkpoints and metrics go to"
        yield Problem(("run.dir",), message)
    start_from, state = config.run.start_from, config.run.start_from_state
    if is_url(start_from) and has_secrets(start_from):
        yield Problem(("run.start_from",), f"start_from={_secret_in(start_from)}")
    if not start_from and state != "weights" and not config.run.stage_begin:
        yield Problem(
            ("run.start_from", "run.start_from_state"),
            f"start_from_state={state} needs start_from, a run, a checkpoint or an export; set it, or leave both out",
        )
