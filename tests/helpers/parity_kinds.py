"""The runs of the parity grid: a kind names what differs from the small run that all of them share."""

import math
from typing import Any

from helpers.parity import change

from mythos_dist.config.layout import layout_problems
from mythos_dist.config.rules import problems
from mythos_dist.config.schema import BY_MODE, Config, RopeScaling

CLIP = 0.2
BIAS = {"one expert": [1e3] + [0.0] * 7, "idle ranks": [1e3, 1e3] + [0.0] * 6}  # experts 0, or 0 and 1, get all tokens

# Four numbers of loops, a loss after each, gradient through all.
_PER_LOOP: dict[str, Any] = dict(distribution="uniform_set", set=(1, 2, 3, 5), mean=None, objective="per_loop")
_STRETCHED = RopeScaling(kind="yarn", factor=2, original_max_seq_len=128, mscale=1.0, mscale_all_dim=1.0)
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "mla": {},
    "gqa": dict(model=dict(attn_type="gqa")),
    # A group of loops begins without gradient, or on another stage.
    "shared keys": dict(model=dict(kv_sharing="every:2"), train=dict(recompute="loop", recompute_every=2)),
    # All stages use those of the first.
    "first keys": dict(model=dict(kv_sharing="first", attn_type="gqa"), loops=dict(_PER_LOOP, backprop=None)),
    "keys by sequence": dict(
        model=dict(kv_sharing="every:2", attn_type="gqa", initial_state="e"), loops=dict(per="sequence")
    ),
    # Scaled residuals, and a penalty on the last loop's change.
    "normed states": dict(
        model=dict(residual_scale="inverse_sqrt", state_norm=True), loops=dict(fixed_point=0.2, per="sequence")
    ),
    # A plain transformer, whose middle layer is looped.
    "no injection": dict(
        model=dict(injection="none", lora="none", initial_state="e", attn_type="gqa"), loops=dict(backprop=None)
    ),
    # What a pretrained model brings, and an injection that begins as none.
    "retrofit": dict(
        model=dict(
            injection="difference",
            lora="none",
            initial_state="e",
            attn_type="gqa",
            loop_layers=2,
            norm_eps=1e-5,
            dense_dim=50,
            gqa_head_dim=6,
            qkv_bias=True,
            key_norm_weight=True,
            n_shared_experts=0,
            tie_embeddings=False,
            expert_dim=64,
        )
    ),
    "two layers": dict(model=dict(loop_layers=2, kv_sharing="every:2")),  # with routers of their own
    "three layers": dict(model=dict(loop_layers=3)),
    "no halting": dict(act=dict(mode="off", ponder_cost=0.0, kl=0.0)),
    "as shipped": dict(model=BY_MODE["reference"], act=dict(mode="reference")),
    "ponder": dict(
        act=dict(mode="ponder", prior=0.3),
        loops=dict(distribution="lognormal_poisson", backprop=None, objective="per_loop"),
    ),
    "per loop": dict(model=dict(lora="per_loop"), loops=dict(_PER_LOOP, teacher=0.7)),
    # Each with a depth of its own, half of the run with a mean that grows.
    "sequences": dict(
        model=dict(initial_state="random", injection="reference", attn_type="gqa"),
        loops=dict(per="sequence", curriculum="1-sqrt", curriculum_steps=2),
    ),
    "one expert": dict(model=dict(n_experts_per_tok=1)),
    "idle ranks": {},
    "odd widths": dict(model=dict(dim=36, expert_dim=7, n_experts=6)),  # every group of parameters is padded
    # Fused shared experts, a LoRA per loop, matrices that no axis divides.
    "muon": dict(
        model=dict(n_shared_experts=2, lora="per_loop", dim=36, expert_dim=7, n_experts=6),
        optim=dict(name="muon", muon_lr=1e-3),
    ),
    # A stage without any block, and one without experts.
    "bare": dict(model=dict(prelude_layers=0, coda_layers=0, vocab_size=4000)),
    "two loops": dict(loops=dict(mean=2)),  # as many stages as can be: loops + 2
    # Stored for each loop, unequally many: a label of the global batch weighs the same anywhere.
    "targets": dict(loops=dict(_PER_LOOP, backprop=None, per="sequence"), data=dict(path="3 targets")),
    "completions": dict(data=dict(path="conversations")),  # labels of prompts do not count
    # A length that nothing divides, of a context that is stretched.
    "prime": dict(model=dict(rope_scaling=_STRETCHED, max_seq_len=256), train=dict(seq_len=31), data=dict(path="")),
}
# The results of these are those without: what is recomputed, how many tokens layers work on, where states are saved.
RECOMPUTED: dict[str, dict[str, dict[str, Any]]] = {
    "loop": dict(train=dict(recompute="loop", recompute_every=2)),
    "selective": dict(train=dict(recompute="selective")),
    "pieces": dict(train=dict(recompute="loop", chunk_tokens=14)),  # divides no number of tokens
    "small pieces": dict(train=dict(recompute="selective", chunk_tokens=10)),
    "offloaded": dict(train=dict(recompute="loop", offload="saved")),
    "offloaded pieces": dict(train=dict(recompute="loop", offload="saved", chunk_tokens=24)),
}


def parts(kind: str) -> list[str]:
    """The kinds that a sum names: "ponder + pieces" is both at once."""
    return kind.split(" + ")


def with_equal_results(kind: str) -> str:
    """The kind of the reference run."""
    return " + ".join(part for part in parts(kind) if part not in RECOMPUTED) or "mla"


def bias_of(kind: str) -> list[float] | None:
    """What is added to the router's bias before the first step."""
    return next((BIAS[part] for part in parts(kind) if part in BIAS), None)


def differences(kind: str) -> dict[str, dict[str, Any]]:
    """Section -> field -> value of all parts, which may not contradict each other."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts(kind):
        for section, fields in (KINDS | RECOMPUTED)[part].items():
            known = merged.setdefault(section, {})
            for name, value in fields.items():
                assert known.setdefault(name, value) == value, f"{kind}: two values of {section}.{name}"
    return merged


def replicas_of(parallel: dict[str, Any], ranks: int) -> int:
    return ranks // math.prod(parallel.get(axis, 1) for axis in ("tensor", "pipe", "context"))


def sequences_of(parallel: dict[str, Any], ranks: int) -> int:
    """Of a step: few, as half as many take 15 % less time, but two micro-batches for every replica."""
    return max(4, 2 * replicas_of(parallel, ranks))


def run_of(config: Config, kind: str, conversations: str = "", sequences: int = 8) -> Config:
    """The run that a kind names, at no particular layout. `conversations`: a folder of shards with a loss mask."""
    config = change(
        config,
        model=dict(vocab_size=515, q_lora_rank=18, lora_rank=6, expert_dim=30, max_loop_iters=4),
        train=dict(global_batch=sequences, micro_batch=1),
        experts=dict(bias_update_rate=0.01, z_loss=0.01, sequence_balance_loss=0.01),
        loops=dict(distribution="poisson", mean=3, maximum=5, backprop=2),
        act=dict(mode="safe", ponder_cost=0.01, kl=0.01),
        # Adam divides by sqrt(v) + eps: with 1e-8 it would blow the rounding of a gradient of 1e-7 up to a step of lr.
        optim=dict(grad_clip=CLIP, eps=1e-6),
        run=dict(seed=18),
    )
    config = change(config, **differences(kind))
    return change(config, data=dict(path=conversations)) if config.data.path == "conversations" else config


def at_layout(config: Config, parallel: dict[str, Any], ranks: int) -> Config:
    """The run at a layout, with two micro-batches per replica and step; refused if the layout cannot work."""
    replicas = replicas_of(parallel, ranks)
    config = change(config, parallel=parallel, train=dict(micro_batch=config.train.global_batch // (2 * replicas)))
    refused = layout_problems(config, ranks) + [line for line in problems(config) if not line.startswith("data.path")]
    assert not refused, refused
    return config
