"""Every setting with its type, range, default and meaning. Rules between settings are in rules.py and layout.py.

In YAML and on the command line a setting is `section.field`. The number of accumulation steps is derived from
`global_batch` and `micro_batch`. Constructing a section with a value of another type or outside its annotated range
raises UserError (fields.py).

Decisions: LOOPS-4, LOOPS-5, LOOPS-9, CONFIG-2.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from mythos_dist.config.fields import PATH, SIZE, Range, Section, Words, kinds_of, show
from mythos_dist.errors import UserError
from mythos_dist.units import bytes_of

MOST_DRAWN_LOOPS = 10**6  # a step's loops are clipped to at most this
BETA_FAST, BETA_SLOW = 32.0, 1.0  # YaRN's defaults
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1.0, 4.0  # Llama 3's
MAX_LOOPS = 512  # 8 times the largest variant's; assigning loops to stages takes quadratic time

# Upper bounds are far beyond what any machine holds: they catch typing errors before hours of computation.
Width = Annotated[int, Range(1, 1 << 20)]  # channels, heads, rows of a matrix
Tokens = Annotated[int, Range(1, 1 << 30)]
Layers = Annotated[int, Range(0, 128)]
LoopCount = Annotated[int, Range(1, MAX_LOOPS)]
Ranks = Annotated[int, Range(1, 1 << 16)]
RankNumber = Annotated[int, Range(0, 1 << 24)]
Sequences = Annotated[int, Range(1, 1 << 30)]
Steps = Annotated[int, Range(1, 10**12)]
RampSize = tuple[Sequences, Sequences]  # sequences per step, and the number of steps, which has the same bounds
StepsOrOff = Annotated[int, Range(0, 10**12)]  # an interval; 0 disables
Count = Annotated[int, Range(0, 10**6)]
SamplePosition = Annotated[int, Range(0, 10**15)]  # of the order of the data
Weight = Annotated[float, Range(0)]  # of a loss term, or a rate
Above0 = Annotated[float, Range(0, above=True)]
Seconds = Annotated[float, Range(1, 10**8)]  # up to three years; threading.Event accepts 292
PathText = Annotated[str, PATH]
SizeText = Annotated[str, SIZE]
_BELOW_1 = 1 - 2**-53  # the largest double below 1
Momentum = Annotated[float, Range(0, _BELOW_1, words="must be at least 0 and below 1")]
_PRIOR = Range(
    0, _BELOW_1, above=True, words="is a probability to halt; set it between 0 and 1, or null for a uniform prior"
)
_SHARE = Range(
    0, 1e100, above=True, words="must be above 0 and at most 1e100; leave the folder out to train without it"
)
Prior = Annotated[float, _PRIOR]
_EVERY = "every:"
_KV_SHARING = Words(
    ("all", "first"),
    _EVERY,
    Range(2, MAX_LOOPS),
    advice=(
        (
            "last",
            ": while all tokens are trained at once, the keys of earlier tokens' last loop do not exist yet; 'first' "
            "caches as little",
        ),
    ),
)
MixWeight = Annotated[float, _SHARE]
MAX_PROFILED_STEPS = 50


def _by_mode(reference: Any, train: Any) -> Any:
    """A field of MythosConfig whose default depends on its `mode`."""
    return field(default=None, metadata={"reference": reference, "train": train})


@dataclass(frozen=True)
class RopeScaling(Section, section="model.rope_scaling"):
    """Rotary positions beyond the length that the model was trained with, `original_max_seq_len` (model/rope.py)."""

    example = "{kind: yarn, factor: 4, original_max_seq_len: 4096}"

    # linear: all positions are divided by `factor` (position interpolation). yarn: those of slow channels only; llama3:
    # too, with other borders and no change of the softmax.
    kind: Literal["linear", "yarn", "llama3"]
    factor: Annotated[float, Range(1, 1e6)]  # times original_max_seq_len, it is model.max_seq_len, but for llama3
    original_max_seq_len: Tokens  # context that the model was trained with before
    # Of llama3: channels that rotate less than this many times within the original length are divided by the factor.
    low_freq_factor: Above0 | None = None  # None: 1 (LOW_FREQ_FACTOR)
    high_freq_factor: Above0 | None = None  # those that rotate more often keep their frequency; None: 4
    # Of yarn, as all that follow; names and defaults are those of transformers. Channels that rotate more than this
    # many times within the original length keep their frequency.
    beta_fast: Above0 | None = None  # None: 32 (BETA_FAST)
    # Channels that rotate less than this many times within the original length are divided by the factor.
    beta_slow: Above0 | None = None  # None: 1 (BETA_SLOW)
    truncate: bool | None = None  # round the channels at which the ramp between both begins and ends; None: true
    attention_factor: Above0 | None = None  # of rotary queries and keys; None: 0.1 ln(factor) + 1, or from mscale
    # Both set, as in DeepSeek-V3: attention_factor is the ratio of 0.1 m ln(factor) + 1 for either m. MLA's softmax
    # scale is multiplied by the square of that of mscale_all_dim.
    mscale: Above0 | None = None
    mscale_all_dim: Above0 | None = None  # see mscale

    def complete(self) -> None:
        """Whole numbers become floats where floats are expected: one value has one text."""
        super().complete()
        for key, kind in kinds_of(type(self)).items():
            value = getattr(self, key)
            if kind.type is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, key, float(value))


@dataclass(frozen=True)
class MythosConfig(Section, section="model"):
    """The model. Fields up to `dropout` have OpenMythos' names, meanings and defaults.

    >>> from mythos_dist import MythosConfig
    >>> MythosConfig(dim=1024, n_heads=16, attn_type="gqa").head_dim
    64
    >>> MythosConfig(dim=0)
    Traceback (most recent call last):
    mythos_dist.errors.UserError: model.dim=0 must be at least 1
    """

    vocab_size: Width = 32000  # rows of the embedding and of the head
    dim: Width = 2048  # width of the residual stream
    n_heads: Width = 16  # attention heads (queries)
    n_kv_heads: Width = 4  # GQA: key-value heads
    max_seq_len: Tokens = 4096  # longest context, in tokens
    max_loop_iters: LoopCount = 16  # loops of the recurrent block; rows of the depth LoRA's table
    prelude_layers: Layers = 2  # dense blocks before the loops
    coda_layers: Layers = 2  # dense blocks after the loops
    attn_type: Literal["gqa", "mla"] = "mla"  # grouped-query or multi-head latent attention
    kv_lora_rank: Width = 512  # MLA: width of the latent of keys and values; the KV cache holds it
    q_lora_rank: Width = 1536  # MLA: width of the latent of queries
    qk_rope_head_dim: Annotated[int, Range(0, 1 << 20)] = 64  # MLA: rotary channels per head
    qk_nope_head_dim: Width = 128  # MLA: channels per head without RoPE
    v_head_dim: Width = 128  # MLA: channels per value head
    n_experts: Width = 64  # routed experts
    n_shared_experts: Annotated[int, Range(0, 1024)] = 2  # always active; width expert_dim * n_experts_per_tok each
    n_experts_per_tok: Width = 4  # routed experts of a token (top-k)
    expert_dim: Width = 512  # hidden width of one routed expert
    # A token halts when its cumulative halting probability reaches this.
    act_threshold: Annotated[float, Range(0, 1, above=True, words="must be above 0 and at most 1")] = 0.99
    rope_theta: Above0 = 500000.0  # base of the rotary frequencies
    lora_rank: Width = 16  # of the depth LoRA
    max_output_tokens: Tokens = 4096  # default limit of generated tokens
    dropout: Momentum = 0.0  # probability, in training, of the outputs of attention and FFNs
    # reference: exactly OpenMythos 0.5.0. train: fixes what prevents OpenMythos from training (the router's bias
    # follows the load); `act.mode` and the fields below are configurable, with defaults measured in docs/loops.md.
    mode: Literal["reference", "train"] = "train"
    # Add sines and cosines of the loop index to the first eighth of the channels.
    loop_signal: bool = _by_mode(reference=True, train=False)
    # Depth LoRA. shared: one pair of matrices with a diagonal per loop; per_loop: a pair of matrices per loop.
    lora: Literal["shared", "per_loop", "none"] = _by_mode(reference="shared", train="shared")
    # parcae: a step size per channel, a full matrix B initialized to the identity, a norm after the prelude. none: each
    # loop is h = block(h), so that max_loop_iters=1 with lora=none is a plain transformer. difference: each loop is
    # h = block(h + b * (e - h)) with b per channel, 0 at first; the first loop is that of none for any b.
    injection: Literal["reference", "parcae", "none", "difference"] = _by_mode(reference="reference", train="parcae")
    # Hidden state before the first loop. e: the prelude's output, also the default with injection=none and difference;
    # random: N(0, 2 / 5).
    initial_state: Literal["e", "zero", "random"] = _by_mode(reference="e", train="zero")
    # Normalize queries and keys: attention logits stay bounded at any depth.
    qk_norm: bool = _by_mode(reference=False, train=True)
    # all: every loop computes keys and values. every:N: the first of every N loops computes them, the next N - 1 use
    # them. first: the first loop computes them for all.
    kv_sharing: Annotated[str, _KV_SHARING] = _by_mode(reference="all", train="all")
    # depth_scaled (Huginn): N(0, 2 / (5 dim)), output projections divided by
    # sqrt(2 * (prelude + loops * loop_layers + coda)).
    # reference: N(0, 0.02).
    init: Literal["reference", "depth_scaled"] = _by_mode(reference="reference", train="depth_scaled")
    # What multiplies attention and FFN of the looped block where they are added to its input, with N = max_loop_iters.
    # init: nothing, only their initial values are small (init=depth_scaled). inverse_sqrt: 1 / sqrt(N). inverse: 1 / N,
    # because the same weights add N correlated terms (Wang et al. 2026, arXiv 2606.18524). With several layers in the
    # block either is also divided by sqrt(loop_layers).
    residual_scale: Literal["init", "inverse_sqrt", "inverse"] = _by_mode(reference="init", train="init")
    # Divide the hidden state by its RMS after every loop.
    state_norm: bool = _by_mode(reference=False, train=False)
    # Layers of the looped block, one after the other in every loop; each has attention, router and experts of its own.
    loop_layers: Annotated[int, Range(1, 128)] = _by_mode(reference=1, train=1)
    # Of all RMSNorms: added to the mean square.
    norm_eps: Annotated[float, Range(0, 1, above=True)] = _by_mode(reference=1e-6, train=1e-6)
    # Hidden width of the FFNs in prelude and coda; 0: dim * 4 // 3, as OpenMythos.
    dense_dim: Annotated[int, Range(0, 1 << 20)] = _by_mode(reference=0, train=0)
    # GQA: channels of a head, also if they are not dim / n_heads together, as in Qwen3; 0: dim / n_heads.
    gqa_head_dim: Annotated[int, Range(0, 1 << 20)] = _by_mode(reference=0, train=0)
    # GQA: biases of the projections to queries, keys and values, as in Qwen2.
    qkv_bias: bool = _by_mode(reference=False, train=False)
    # GQA: with qk_norm, the norm of keys has a weight too, as in Qwen3. That of queries can replace it only if both
    # channels of a rotated pair have the same weight.
    key_norm_weight: bool = _by_mode(reference=False, train=False)
    tie_embeddings: bool = _by_mode(reference=True, train=True)  # the output head is the embedding
    rope_scaling: RopeScaling | None = None  # a context longer than the one that the model was trained with

    def complete(self) -> None:
        """Set the defaults that depend on `mode`, and on `injection`."""
        if self.injection in ("none", "difference") and self.initial_state is None:
            object.__setattr__(self, "initial_state", "e")
        for key, default in BY_MODE.get(self.mode if isinstance(self.mode, str) else "", {}).items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, default)
        if isinstance(self.rope_scaling, dict):  # from a checkpoint
            try:
                object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
            except TypeError as error:  # a missing or unknown field
                raise UserError(f"model.rope_scaling={show(self.rope_scaling)}: {error}") from None
        super().complete()

    def contradictions(self) -> list[str]:
        """Rules between the model's own settings."""
        from mythos_dist.config.rules import model_problems  # it imports this module

        return model_problems(self)

    @property
    def head_dim(self) -> int:
        """Channels of one query or key head."""
        if self.attn_type == "gqa":
            return self.gqa_head_dim or self.dim // self.n_heads
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def widest_head(self) -> int:
        """Channels of the widest of query, key and value heads: attention kernels get all padded to it."""
        return max(self.head_dim, self.v_head_dim if self.attn_type == "mla" else 0)

    @property
    def rope_dim(self) -> int:
        """Rotary channels per head: all in GQA, a part in MLA."""
        return self.head_dim if self.attn_type == "gqa" else self.qk_rope_head_dim

    @property
    def kv_loops(self) -> int:
        """Consecutive loops that share keys and values; 1: each computes its own."""
        words = {"all": 1, "first": MOST_DRAWN_LOOPS}
        return words[self.kv_sharing] if self.kv_sharing in words else int(self.kv_sharing.removeprefix(_EVERY))

    @property
    def residual_factor(self) -> float:
        """The factor of `residual_scale`."""
        if self.residual_scale == "init":
            return 1.0
        of_loops = float(self.max_loop_iters) ** (-0.5 if self.residual_scale == "inverse_sqrt" else -1.0)
        return of_loops * float(self.loop_layers) ** -0.5

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the dense FFN in prelude and coda."""
        return self.dense_dim or self.dim * 4 // 3

    @property
    def shared_dim(self) -> int:
        """Hidden width of all shared experts together: they are fused into one SwiGLU."""
        return self.n_shared_experts * self.expert_dim * self.n_experts_per_tok


# Defaults that depend on model.mode.
BY_MODE: dict[str, dict[str, Any]] = {
    mode: {one.name: one.metadata[mode] for one in fields(MythosConfig) if one.metadata}
    for mode in ("reference", "train")
}


@dataclass(frozen=True)
class ExpertsConfig(Section, section="experts"):
    """How routed experts run, and how their load is balanced.

    >>> from mythos_dist import ExpertsConfig
    >>> ExpertsConfig(z_loss=1e-3).backend
    'grouped'
    """

    # grouped: torch's grouped matrix product. megablocks: MegaBlocks' kernels, bf16 on GPUs (launch/install_gpu.sh).
    # reference: one expert after the other, for tests.
    backend: Literal["grouped", "megablocks", "reference"] = "grouped"
    bias_update_rate: Weight = 1e-3  # change per step of an expert's routing bias (DeepSeek-V3); 0: none
    z_loss: Weight = 0.0  # weight of mean(logsumexp(router logits)^2) (ST-MoE, Zoph et al. 2022)
    sequence_balance_loss: Weight = 0.0  # weight of DeepSeek-V3's sequence-wise auxiliary loss


@dataclass(frozen=True)
class ActConfig(Section, section="act"):
    """Adaptive computation time: which loops' states the coda gets.

    >>> from mythos_dist import ActConfig, MythosConfig
    >>> ActConfig().mode_of(MythosConfig(mode="reference"))
    'reference'
    """

    # off: the last loop's; nothing halts. reference: the sum of all, weighted by halting probabilities, as in
    # OpenMythos, which drops the probability that remains after the last loop. safe: the same, but the last loop gets
    # the remaining probability. ponder: in training every loop's, each loss weighted by its halting probability
    # (loops.objective=per_loop); otherwise the first at which the sum of probabilities reaches model.act_threshold.
    # None: off, or reference with model.mode=reference.
    mode: Literal["reference", "safe", "ponder", "off"] | None = None
    ponder_cost: Weight = 0.0  # loss in nats per expected loop of a token
    kl: Weight = 0.0  # weight of KL(halting distribution, prior)
    # Halting probability per loop of a geometric prior (PonderNet); None: a uniform prior (Ouro's entropy term).
    prior: Prior | None = None

    def mode_of(self, model: MythosConfig) -> str:
        """The mode, also where it is not set."""
        return self.mode or ("reference" if model.mode == "reference" else "off")


@dataclass(frozen=True)
class LoopsConfig(Section, section="loops"):
    """How many loops training runs. They are drawn from (run.seed, step), so they are the same in every layout."""

    # poisson: at least 1 (Parcae). lognormal_poisson: 1 + Poisson with a log-normal rate (Huginn), heavy-tailed.
    # uniform_set: uniform over `set`.
    distribution: Literal["fixed", "poisson", "lognormal_poisson", "uniform_set"] = "fixed"
    mean: LoopCount | None = None  # None: model.max_loop_iters, or the mean of `set`
    # Larger draws are clipped to this; None: four times the mean.
    maximum: Annotated[int, Range(1, MOST_DRAWN_LOOPS)] | None = None
    sigma: Annotated[float, Range(0, 10)] = 0.5  # lognormal_poisson: standard deviation of the log rate
    set: tuple[LoopCount, ...] = ()  # uniform_set: such as [1, 2, 4, 8]
    per: Literal["step", "sequence"] = "step"  # one draw for all sequences of a step, or one for each
    # The mean (uniform_set: the largest number drawn) grows from 1 over the first `curriculum_steps` steps, linearly or
    # as 1 - sqrt(1 - x).
    curriculum: Literal["none", "linear", "1-sqrt"] = "none"
    curriculum_steps: StepsOrOff = 0  # steps of `curriculum`
    backprop: LoopCount | None = None  # number of last loops with gradient (truncated BPTT); None: all
    # final: the loss after the last loop. per_loop: the mean over loops of the loss if that loop were the last
    # (act.mode=ponder: weighted by halting probabilities), against the targets of that loop if the shards have them.
    objective: Literal["final", "per_loop"] = "final"
    # objective=per_loop: the last loop teaches the others. Weight of KL(its output distribution || that of an earlier
    # loop) in each earlier loop's loss; 0: no teacher.
    teacher: Weight = 0.0
    # Weight of a penalty on the relative change of the hidden state by the last loop (model/fixed_point.py).
    fixed_point: Weight = 0.0
    telemetry_every: StepsOrOff = 100  # steps between telemetry samples inside the loops; 0: none
    sweep: tuple[LoopCount, ...] = ()  # numbers of loops to evaluate besides the mean

    def readouts(self, n_loops: int, no_grad_loops: int) -> int:
        """Losses per training step of `n_loops` loops, of which the first `no_grad_loops` have no gradient."""
        return n_loops - no_grad_loops if self.objective == "per_loop" else 1

    def mean_of(self, model: MythosConfig) -> int:
        """Average loops per step; evaluation runs this many, and pipeline stages are balanced for it."""
        if self.distribution == "uniform_set" and self.set:
            return max(1, round(sum(self.set) / len(self.set)))
        return model.max_loop_iters if self.mean is None else self.mean

    def most_of(self, model: MythosConfig) -> int:
        """The most loops of a step."""
        if self.distribution == "fixed":
            return self.mean_of(model)
        return self.maximum or 4 * max(self.mean_of(model), *self.set, 1)


@dataclass(frozen=True)
class ParallelConfig(Section, section="parallel"):
    """The mesh. The data axis takes the remaining ranks: ranks / ranks_per_replica replicas."""

    tensor: Ranks = 1  # ranks over which each matrix is sharded
    pipe: Annotated[int, Range(1, 128)] = 1  # pipeline stages
    context: Ranks = 1  # ranks over which the tokens of each sequence are divided
    expert: Ranks = 1  # neighboring ranks of data x context over which the routed experts are sharded
    sequence: bool = False  # sequence parallelism: norms and residuals on 1 / tensor of each sequence
    zero: Literal[1, 2, 3] = 1  # ZeRO stage: shard 1 optimizer state, 2 also gradients, 3 also parameters

    @property
    def ranks_per_replica(self) -> int:
        """pipe * context * tensor."""
        return self.pipe * self.context * self.tensor


@dataclass(frozen=True)
class TrainConfig(Section, section="train"):
    """Length, batch size, precision, recomputation and evaluation of a run."""

    steps: Steps = 1000  # optimizer updates
    seq_len: Tokens = 1024  # tokens per sequence
    global_batch: Sequences = 8  # sequences per step, over all replicas; with `batch_ramp` those of the steps after it
    # Smaller global batches of the first steps, ascending: [[8, 100], [16, 200]] is 8 sequences per step for 100 steps,
    # then 16 for 200 steps, then `global_batch`. The learning rate is not scaled.
    batch_ramp: tuple[RampSize, ...] = ()
    micro_batch: Sequences = 1  # sequences per replica and forward pass
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"  # of weights and activations; the optimizer has fp32 copies
    # auto: flash-attn if installed, on GPUs in half precision; otherwise PyTorch's scaled_dot_product_attention (sdpa).
    attention: Literal["auto", "flash_attn", "sdpa"] = "auto"
    # torch.compile every block: takes minutes at startup and needs a C++ compiler; not with ZeRO-3.
    compile: bool = False
    # Activation recomputation. loop: everything inside a loop. selective: in attention from the latents on (GQA: from
    # q, k, v), in FFNs from the input on.
    recompute: Literal["none", "loop", "selective"] = "none"
    recompute_every: LoopCount = 1  # recompute=loop: keep the hidden state before every N-th loop only
    # Tokens that FFNs, experts and the head work on at a time, forward and backward, counted over a sequence-parallel
    # group: memory for hidden rows does not grow with the sequence, and they are computed twice. null or 0: all tokens;
    # `mythos plan` chooses a number where nothing else fits.
    chunk_tokens: Annotated[int, Range(0, 1 << 30)] | None = None
    # saved: with recompute=loop the hidden state that each loop keeps for the backward goes to host memory.
    offload: Literal["none", "saved"] = "none"
    eval_every: StepsOrOff = 0  # steps between evaluations; 0: only before the first and after the last step
    # Maximum of held-out sequences per evaluation; 0: no evaluation.
    eval_samples: Annotated[int, Range(0, 1 << 30)] = 64
    # Tasks of `mythos evaluate` that are scored by log-likelihood: names, and YAML files (docs/evaluation.md).
    tasks: tuple[str, ...] = ()
    tasks_every: StepsOrOff = 0  # steps between evaluations on `tasks`; 0: only after the last step

    @property
    def batch_sizes(self) -> list[int]:
        """The global batches of a run, in order."""
        return [*(size for size, _ in self.batch_ramp), self.global_batch]

    def batch_size_at(self, step: int) -> int:
        """Sequences of step `step` (1-based) of the schedule, over all replicas."""
        for size, steps in self.batch_ramp:
            if step <= steps:
                return size
            step -= steps
        return self.global_batch

    def samples_until(self, step: int) -> int:
        """Sequences of the steps 1 to `step` of the schedule together."""
        samples = 0
        for size, steps in self.batch_ramp:
            samples += size * min(steps, step)
            step -= min(steps, step)
        return samples + self.global_batch * step


@dataclass(frozen=True)
class OptimConfig(Section, section="optim"):
    """The optimizer and its learning rate: linear warm-up to `lr`, then `schedule` (formulas: train/schedule.py)."""

    # muon: matrices of the blocks (those with weight decay) by Muon (Jordan et al. 2024), all other parameters by
    # AdamW. Updates have the RMS of AdamW's, so the same rate and weight decay suit both (Moonlight, Liu et al. 2025).
    name: Literal["adamw", "muon"] = "adamw"
    lr: Weight = 3e-4  # peak learning rate
    muon_lr: Weight | None = None  # peak rate of the matrices; None: lr. It follows the same schedule.
    muon_momentum: Momentum = 0.95  # of the matrices' moment
    muon_nesterov: bool = True  # Nesterov momentum
    muon_ns_steps: Annotated[int, Range(1, 99)] = 5  # Newton-Schulz iterations that orthogonalize an update
    # cosine, linear: down to lr * min_lr_ratio right after the warm-up, then constant. wsd: constant until the last
    # `decay_steps` steps. inverse_sqrt: lr * sqrt(warmup_steps / step).
    schedule: Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt"] = "cosine"
    decay_steps: Steps | None = None  # None: all steps after the warm-up (cosine, linear), a tenth of the run (wsd)
    decay: Literal["linear", "1-sqrt"] = "linear"  # shape of wsd's decay
    min_lr_ratio: Annotated[float, Range(0, 1, words="must lie between 0 and 1")] = 0.1  # constant: not used
    warmup_steps: StepsOrOff = 100  # linear warm-up from 0
    beta1: Momentum = 0.9  # decay of AdamW's first moment
    beta2: Momentum = 0.95  # decay of AdamW's second moment
    eps: Above0 = 1e-8  # AdamW: added to the root of the second moment
    weight_decay: Weight = 0.1  # of matrices only: not of norms, injection, halting, biases, embeddings
    grad_clip: Weight = 1.0  # maximum global gradient norm; 0: no clipping

    @property
    def matrix_lr(self) -> float:
        """Peak rate of the parameters that `decays` names."""
        return self.lr if self.muon_lr is None else self.muon_lr

    def uses_muon(self, name: str) -> bool:
        """Whether Muon updates a parameter, by canonical name."""
        return self.name == "muon" and self.decays(name)

    @staticmethod
    def decays(name: str) -> bool:
        """Whether a parameter is a matrix of a block, by canonical name: those have weight decay. The depth LoRA's
        scale is an embedding, and the injection's matrix is part of the recurrence."""
        kept = ("norm.weight", "injection.", "act.", "bias", "embed.", "unembed.", "lora.scale")
        return not any(part in name for part in kept)


@dataclass(frozen=True)
class AverageConfig(Section, section="average"):
    """A second set of weights that averages those of training: 4 bytes per parameter / replica (train/average.py)."""

    # mean: of the last `last` snapshots of the weights. ema: exponential moving average, in which the snapshots from
    # the newest back have the weights decay^0, decay^1, ... divided by their sum.
    kind: Literal["off", "mean", "ema"] = "off"
    every: Steps = 10  # steps between snapshots
    # mean: snapshots per window. The run's last window ends with its last snapshot; null: all since the beginning.
    last: Steps | None = 10
    decay: Momentum = 0.99  # ema: per snapshot, not per step
    evaluate: bool = False  # evaluate the averaged weights, too, whenever the weights are evaluated

    @property
    def steps(self) -> int:
        """The fewest steps after which an average is complete."""
        return self.every * (self.last or 1) if self.kind == "mean" else self.every


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
    """Which shards a run reads, and how."""

    path: PathText = ""  # a folder of MDS shards with manifest.json, or its URL: s3://bucket/folder
    # Instead of `path`: several such folders with weights, such as {shards/web: 0.7, shards/code: 0.3}. Every range of
    # steps holds samples in this ratio; a corpus that is exhausted starts its next epoch.
    mix: dict[str, MixWeight] | None = None
    # Weights that those of `mix` change to, linearly from the first to the second of `mix_samples`, in sequences:
    # [40000, 80000] is steps 5001 to 10000 with train.global_batch=8. Each mix may have folders that the other has not.
    mix_end: dict[str, MixWeight] | None = None
    mix_samples: tuple[SamplePosition, SamplePosition] | None = None  # see mix_end
    tokenizer: PathText | None = None  # None: the one in the folder of shards
    document_mask: bool = True  # attention within documents only
    workers: Annotated[int, Range(0, 1024)] = 0  # loader processes per rank
    verify: bool = True  # check a shard's hash at its first read in each process; false: if the storage does
    # Folder on each node for shards from a store and for unpacked ones; several jobs may use it. None: in the system's
    # temporary folder.
    cache: PathText | None = None
    # Bytes that shards from stores may take there, such as 400kB or 200GB: those that are needed last are removed.
    # None: nothing is removed. Unpacked shards of local folders are not counted and never removed.
    cache_limit: SizeText | None = None
    prefetch_shards: Annotated[int, Range(0, 10_000)] = 8  # shards that each node downloads before they are needed

    @property
    def cache_bytes(self) -> int | None:
        """`cache_limit` in bytes."""
        return None if self.cache_limit is None else bytes_of(self.cache_limit)

    @property
    def mix_begin(self) -> dict[str, float]:
        """The folders of shards with their weights at the beginning; `path` is the mix of one."""
        return {self.path: 1.0} if self.mix is None else self.mix

    @property
    def folders(self) -> dict[str, float]:
        """All folders of shards with their weights; of a mix that changes, mean weights."""
        mix, end = self.mix_begin, self.mix_end
        if end is None:
            return mix
        before, after = sum(mix.values()), sum(end.values())
        names = [*mix, *(name for name in end if name not in mix)]
        return {name: (mix.get(name, 0.0) / before + end.get(name, 0.0) / after) / 2 for name in names}


@dataclass(frozen=True)
class CheckpointConfig(Section, section="checkpoint"):
    """When checkpoints are saved, and how they are kept, verified and copied."""

    every: Steps = 100  # steps; the last step is always saved
    keep: Annotated[int, Range(1, 10**6)] = 2  # newest checkpoints to keep
    pin: tuple[Steps, ...] = ()  # steps whose checkpoints are saved and kept forever
    pin_every: StepsOrOff = 0  # steps between such checkpoints; 0: none
    # Training waits only for a copy in host memory (12 bytes per parameter / replica, 4 more with `average`); false:
    # until everything is on disk.
    background: bool = True
    # Before loading compare the hash of every file; false: only sizes. In a store: of files that one rank reads
    # completely.
    verify: bool = True
    # File with a key that signs checkpoints; others are then refused (docs/security.md). None: the file that the
    # environment variable MYTHOS_CHECKPOINT_KEY_FILE names, if set.
    key_file: PathText | None = None
    # URL of a folder of this run in a store, such as s3://bucket/run: each checkpoint is copied there in the
    # background, with the run's logs, and a run without a checkpoint in run.dir resumes from there. None: no copies.
    remote: PathText | None = None
    remote_keep: Annotated[int, Range(1, 10**6)] | None = None  # newest checkpoints to keep there; None: all
    # Checkpoints that wait for their upload and stay in run.dir beyond `keep`; with more, the oldest are deleted.
    remote_backlog: Count = 8
    remote_wait: Seconds = 600  # for the last uploads, when the run is complete
    remote_wait_stopped: Seconds = 30  # the same, when it was stopped: a scheduler kills it soon


@dataclass(frozen=True)
class ProfileConfig(Section, section="run.profile"):
    """A profile of some steps (docs/profiles.md)."""

    example = "{steps: [10, 12], ranks: [0], memory: true}"

    steps: tuple[Steps, Steps]  # first and last step of the trace
    ranks: tuple[RankNumber, ...] = (0,)  # ranks that write a profile
    # Also measure what holds memory, in the step after the trace; that step is slow.
    memory: bool = True

    def contradictions(self) -> list[str]:
        """Rules between the settings."""
        first, last = self.steps
        if last < first:
            return [
                f"run.profile.steps={[first, last]}: the last step is before the first; set it to [{last}, {first}]"
            ]
        if last - first >= MAX_PROFILED_STEPS:
            return [
                f"run.profile.steps={[first, last]}: more than {MAX_PROFILED_STEPS} steps, and a trace holds every "
                f"operation in memory; set it to [{first}, {first + MAX_PROFILED_STEPS - 1}]"
            ]
        return [] if self.ranks else ["run.profile.ranks=[]: no rank would write a profile; set it to [0]"]


@dataclass(frozen=True)
class RunConfig(Section, section="run"):
    """The run folder, the weights that a run begins with, its seed, and what it records."""

    dir: PathText = "runs/mythos"  # run folder; a run whose folder has a checkpoint resumes
    # A run (its newest checkpoint), a checkpoint or an export, or the URL of one: a run without a checkpoint of its own
    # begins with its weights. In YAML and on the command line this and `start_from_state` need no section.
    start_from: PathText = ""
    # weights: with the router's bias; schedule and data start over. weights+moments: also the optimizer's. everything:
    # step count (of schedule, loops and random numbers), loss scale and data order continue as in a resume.
    start_from_state: Literal["weights", "weights+moments", "everything"] = "weights"
    stage: str = ""  # set by `stages:` (stages.py): the name of the stage
    stage_begin: StepsOrOff = 0  # set by `stages:`: the step of the run after which the stage begins
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0  # of initial weights, data order and loops
    wandb: Literal["offline", "online", "disabled"] = "offline"  # offline: a record in the run folder
    project: str = "mythos_dist"  # project of the run in wandb
    group: str = ""  # group of runs in wandb, such as those of one study; empty: none
    tags: tuple[str, ...] = ()  # of the run in wandb
    tensorboard: bool = False  # write events to run.dir/tensorboard; needs the package tensorboard
    # Log the bytes that all ranks send, by axis and kind, with each step (`communication`). Slows CPU steps down.
    count_communication: bool = False
    # Peak TFLOP/s of one rank, for `mfu`; None: looked up by the GPU's name, measured at startup on CPUs.
    peak_tflops: Annotated[float, Range(0, above=True, advice=", or null to find it out")] | None = None
    # Seconds after which the run finishes its step, saves and exits with code 85; None: no limit. Set it below the
    # scheduler's time limit by at least one step and one checkpoint.
    max_seconds: Annotated[float, Range(0, 10**9, above=True, advice=", or null for no limit")] | None = None
    # File such as configs/clusters/h100_80gb.yaml, for planned memory per rank and step time. None: this machine's
    # memory, and no step time.
    cluster: PathText | None = None
    check_memory: bool = True  # refuse a layout whose planned memory does not fit; false: start anyway
    report: bool = True  # write report.html when the run is done
    profile: ProfileConfig | None = None  # a trace of some steps; the file PROFILE in run.dir asks for one, too

    def complete(self) -> None:
        """A profile that comes from a checkpoint is a dict."""
        if isinstance(self.profile, dict):
            object.__setattr__(self, "profile", ProfileConfig(**self.profile))
        super().complete()


@dataclass(frozen=True)
class FaultsConfig(Section, section="faults"):
    """Timeouts, and what to do about non-finite gradients and spikes."""

    join_within: Seconds = 300  # seconds for all ranks to report at startup
    hang_after: Seconds = 600  # seconds after which a step (or loading, evaluating, saving) counts as hung
    lost_after: Seconds = 30  # seconds without a heartbeat after which a rank counts as lost
    preflight: bool = True  # check every node and the network between nodes before building the model
    clock_skew: Annotated[float, Range(0, 10**8)] = 5  # maximum difference of the nodes' clocks, in seconds
    retry: bool = True  # recompute a step with non-finite gradients once before skipping it
    # Skip a step whose gradient norm exceeds this many times the median of the last 100; 0: skip only non-finite
    # gradients.
    spike_factor: Weight = 0
    # Consecutive skipped steps after which the run loads the last checkpoint and skips their batches.
    roll_back_after: Annotated[int, Range(1, 10**6)] = 3
    max_rollbacks: Count = 3  # after one more the run exits with code 5
    inject: str = ""  # faults to inject, for drills (mythos_dist/ops/cluster/inject.py)


@dataclass(frozen=True)
class Config:
    """All settings of a run, by section; every section has defaults.

    >>> from mythos_dist import Config, MythosConfig
    >>> config = Config(model=MythosConfig(max_loop_iters=8))
    >>> config.loops.mean_of(config.model), config.train.steps
    (8, 1000)
    """

    model: MythosConfig = field(default_factory=MythosConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    act: ActConfig = field(default_factory=ActConfig)
    loops: LoopsConfig = field(default_factory=LoopsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    @property
    def end(self) -> int:
        """`train.steps` plus the steps of earlier stages: what a complete run is recognized by. It grows with each
        stage that is added."""
        return self.run.stage_begin + self.train.steps

    @property
    def chunk_size(self) -> int:
        """`train.chunk_tokens`, or 0 if a rank has no more tokens of a micro-batch than that."""
        train, size = self.train, self.train.chunk_tokens or 0
        return size if size < train.micro_batch * -(-train.seq_len // self.parallel.context) else 0

    def __post_init__(self) -> None:
        """Raises UserError for a section of another type, such as a dict."""
        wrong = [
            f"{one.name}={show(value)}: expected an instance of {one.type.__name__}"  # pyright: ignore[reportAttributeAccessIssue]
            for one in fields(self)
            if type(value := getattr(self, one.name)) is not one.type
        ]
        if wrong:
            raise UserError(wrong)
