"""Every setting, its type, its default and what it means. `check` and `layout` say what cannot work together.

A setting's path in YAML and on the command line is `section.field`. `global_batch` and `micro_batch` are set,
the accumulation between them is derived. Each number has its range in its annotation: a section that is out of it, or
holds a value of another type, raises UserError when it is built (config/fields.py).
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from mythos_dist.config.fields import PATH, Range, Section, show
from mythos_dist.errors import UserError

MOST_LOOPS = 512  # 8 times what the largest size runs; dealing them out to stages takes their number squared

# Upper bounds are far beyond what any machine holds: they keep a typing error from being computed with for hours.
Width = Annotated[int, Range(1, 1 << 20)]  # channels, rows of a matrix, and what is counted like them
Tokens = Annotated[int, Range(1, 1 << 30)]
Layers = Annotated[int, Range(0, 128)]
Loops = Annotated[int, Range(1, MOST_LOOPS)]
Ranks = Annotated[int, Range(1, 1 << 16)]
Sequences = Annotated[int, Range(1, 1 << 30)]
Steps = Annotated[int, Range(1, 10**12)]
StepsOrOff = Annotated[int, Range(0, 10**12)]  # 0 switches off what is counted in them
Count = Annotated[int, Range(0, 10**6)]
Weight = Annotated[float, Range(0)]  # of a part of the loss, or a rate
Above0 = Annotated[float, Range(0, above=True)]
Seconds = Annotated[float, Range(1, 10**8)]  # three years; threading.Event takes no more than 292
PathText = Annotated[str, PATH]
_BELOW_1 = 1 - 2**-53  # the largest double that is
Momentum = Annotated[float, Range(0, _BELOW_1, words="must be at least 0 and below 1")]
_PRIOR = Range(
    0, _BELOW_1, above=True, words="is a probability to halt; set it between 0 and 1, or null for a uniform prior"
)
_SHARE = Range(
    0, 1e100, above=True, words="must be above 0 and at most 1e100; leave the folder out to train without it"
)
Prior = Annotated[float, _PRIOR]
MixWeight = Annotated[float, _SHARE]


def _by_mode(reference: Any, train: Any) -> Any:
    """A field of MythosConfig whose default depends on its `mode`."""
    return field(default=None, metadata={"reference": reference, "train": train})


@dataclass(frozen=True)
class MythosConfig(Section, section="model"):
    """The model. Field names up to `dropout` are OpenMythos', and so are their meanings and defaults."""

    vocab_size: Width = 32000
    dim: Width = 2048  # width of the residual stream
    n_heads: Width = 16
    n_kv_heads: Width = 4  # GQA only
    max_seq_len: Tokens = 4096  # the longest context, in tokens
    max_loop_iters: Loops = 16  # loops of the recurrent block, and rows of the depth LoRA's table
    prelude_layers: Layers = 2
    coda_layers: Layers = 2
    attn_type: Literal["gqa", "mla"] = "mla"
    kv_lora_rank: Width = 512  # MLA: width of the latent that keys and values are made from; what the cache holds
    q_lora_rank: Width = 1536  # MLA: width of the queries' latent
    qk_rope_head_dim: Annotated[int, Range(0, 1 << 20)] = 64  # MLA: rotary channels per head
    qk_nope_head_dim: Width = 128  # MLA: channels per head without position
    v_head_dim: Width = 128  # MLA
    n_experts: Width = 64  # routed experts
    n_shared_experts: Annotated[int, Range(0, 1024)] = 2  # always active; each `expert_dim * n_experts_per_tok` wide
    n_experts_per_tok: Width = 4
    expert_dim: Width = 512  # hidden width of one routed expert
    # A token halts when its cumulative halting probability reaches this.
    act_threshold: Annotated[float, Range(0, 1, above=True, words="must be above 0 and at most 1")] = 0.99
    rope_theta: Above0 = 500000.0
    lora_rank: Width = 16  # depth LoRA
    max_output_tokens: Tokens = 4096  # default bound on generated tokens
    dropout: Momentum = 0.0
    # `reference` gives OpenMythos 0.5.0's numbers exactly. `train` mends what keeps it from training: the router's bias
    # follows the load, and `act.mode` and what is below can be chosen. Its defaults are what docs/loops.md measured.
    mode: Literal["reference", "train"] = "train"
    # Sines and cosines of the loop's number in the first eighth of the channels.
    loop_signal: bool = _by_mode(reference=True, train=False)
    # Depth LoRA: one pair of matrices with a diagonal per loop, a pair of matrices per loop, or none.
    lora: Literal["shared", "per_loop", "none"] = _by_mode(reference="shared", train="shared")
    # parcae: a step size per channel, a full matrix B that starts as the identity, a norm behind the prelude.
    injection: Literal["reference", "parcae"] = _by_mode(reference="reference", train="parcae")
    # Of the loops: the prelude's output, zeros, or N(0, 2 / 5).
    initial_state: Literal["e", "zero", "random"] = _by_mode(reference="e", train="zero")
    # Queries and keys are brought to one length: attention stays sane at any depth.
    qk_norm: bool = _by_mode(reference=False, train=True)
    # depth_scaled: matrices N(0, 2 / (5 dim)), those that write to the residual stream divided by
    # sqrt(2 * (prelude + loops + coda)) (Huginn); reference: N(0, 0.02).
    init: Literal["reference", "depth_scaled"] = _by_mode(reference="reference", train="depth_scaled")

    def complete(self) -> None:
        """Set what depends on `mode`."""
        for key, default in BY_MODE.get(self.mode if isinstance(self.mode, str) else "", {}).items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, default)
        super().complete()

    def contradictions(self) -> list[str]:
        """Of a model by itself: rules for widths that divide each other, and what `mode` allows."""
        from mythos_dist.config.rules import model_problems  # it imports this module

        return model_problems(self)

    @property
    def head_dim(self) -> int:
        """Channels of one query or key head."""
        return self.dim // self.n_heads if self.attn_type == "gqa" else self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def widest_head(self) -> int:
        """Channels of a query, key or value head, whichever has most: attention kernels get all of them as wide."""
        return max(self.head_dim, self.v_head_dim if self.attn_type == "mla" else 0)

    @property
    def rope_dim(self) -> int:
        """Rotary channels of one head: all of them in GQA, a part in MLA."""
        return self.head_dim if self.attn_type == "gqa" else self.qk_rope_head_dim

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the dense FFN in prelude and coda (OpenMythos: dim * 4 // 3)."""
        return self.dim * 4 // 3

    @property
    def shared_dim(self) -> int:
        """Hidden width of all shared experts together: their sum is one wider SwiGLU."""
        return self.n_shared_experts * self.expert_dim * self.n_experts_per_tok


# Of each mode, the defaults that are its own.
BY_MODE: dict[str, dict[str, Any]] = {
    mode: {one.name: one.metadata[mode] for one in fields(MythosConfig) if one.metadata}
    for mode in ("reference", "train")
}


@dataclass(frozen=True)
class ExpertsConfig(Section, section="experts"):
    """How routed experts run, and how their load is kept even."""

    # grouped: torch's grouped matrix product. megablocks: MegaBlocks' kernels, bf16 on a GPU (launch/install_gpu.sh).
    # reference: one expert after the other, for tests.
    backend: Literal["grouped", "megablocks", "reference"] = "grouped"
    bias_update_rate: Weight = 1e-3  # a step's change of an expert's selection bias (DeepSeek-V3); 0 switches it off
    z_loss: Weight = 0.0  # weight of mean(logsumexp(router logits)^2) (ST-MoE, Zoph et al. 2022)
    sequence_balance_loss: Weight = 0.0  # weight of DeepSeek-V3's sequence-wise auxiliary loss


@dataclass(frozen=True)
class ActConfig(Section, section="act"):
    """Which loop's state goes on (adaptive computation time)."""

    # off: the last loop's; nothing halts. reference: the sum of all, weighted by halting probabilities, as OpenMythos
    # has it, which loses the mass that is left after the last loop. safe: the same, but the last loop takes what is
    # left. ponder: every loop's in training, each with its halting probability (loops.objective=per_loop); otherwise
    # the first at which their sum reaches model.act_threshold. None: off, and reference in model.mode=reference.
    mode: Literal["reference", "safe", "ponder", "off"] | None = None
    ponder_cost: Weight = 0.0  # nats of loss for each loop that a token is expected to take
    kl: Weight = 0.0  # weight of KL(halting distribution, prior)
    # Of the geometric prior (PonderNet), the probability to halt in a loop; None: a uniform prior (Ouro's entropy).
    prior: Prior | None = None

    def mode_of(self, model: MythosConfig) -> str:
        """The mode, whoever set it."""
        return self.mode or ("reference" if model.mode == "reference" else "off")


@dataclass(frozen=True)
class LoopsConfig(Section, section="loops"):
    """How many loops training runs. Numbers are drawn from (run.seed, step): the same at every layout."""

    # poisson: at least 1 (Parcae). lognormal_poisson: 1 + Poisson of a log-normal rate (Huginn), a heavy tail.
    # uniform_set: any of `set`.
    distribution: Literal["fixed", "poisson", "lognormal_poisson", "uniform_set"] = "fixed"
    mean: Loops | None = None  # None: model.max_loop_iters, or the set's
    maximum: Annotated[int, Range(1, 10**6)] | None = (
        None  # larger numbers that are drawn become this; None: four times the mean
    )
    sigma: Annotated[float, Range(0, 10)] = 0.5  # lognormal_poisson: standard deviation of the rate's logarithm
    set: tuple[Loops, ...] = ()
    per: Literal["step", "sequence"] = "step"  # whether the sequences of a step have one number, or each its own
    # The mean (of a set: the largest number that is drawn) grows from 1 in the first `curriculum_steps` steps: along a
    # line, or as 1 - sqrt(1 - x).
    curriculum: Literal["none", "linear", "1-sqrt"] = "none"
    curriculum_steps: StepsOrOff = 0
    backprop: Loops | None = None  # gradient flows through the last so many loops; None: through all
    # final: the loss of what the last loop leaves. per_loop: the mean over loops of the loss if that loop were the last
    # (act.mode=ponder: each with its halting probability). Where shards have targets for each loop, with that loop's.
    objective: Literal["final", "per_loop"] = "final"
    telemetry_every: StepsOrOff = 100  # steps between looks at what happens inside the loops; 0: none
    sweep: tuple[Loops, ...] = ()  # numbers of loops that evaluation measures besides the mean: a curve over depth

    def readouts(self, n_loops: int, frozen: int) -> int:
        """How often a training step of so many loops, the first ones without gradient, is read out."""
        return n_loops - frozen if self.objective == "per_loop" else 1

    def mean_of(self, model: MythosConfig) -> int:
        """The loops that a step runs on average; evaluation runs as many, and stages are balanced for them."""
        if self.distribution == "uniform_set" and self.set:
            return max(1, round(sum(self.set) / len(self.set)))
        return model.max_loop_iters if self.mean is None else self.mean


@dataclass(frozen=True)
class ParallelConfig(Section, section="parallel"):
    """How the run is spread over ranks. What the axes leave is the data axis: ranks / (pipe * tensor) replicas."""

    tensor: Ranks = 1  # ranks that share each matrix
    pipe: Annotated[int, Range(1, 128)] = 1  # stages that the layers are cut into
    expert: Ranks = 1  # neighbouring replicas that share one copy of the routed experts
    sequence: bool = False  # norms and residuals on 1 / tensor of each sequence
    zero: Literal[1, 2, 3] = 1  # what is sharded over replicas: 1 optimizer state, 2 and gradients, 3 and parameters


@dataclass(frozen=True)
class TrainConfig(Section, section="train"):
    steps: Steps = 1000  # optimizer updates
    seq_len: Tokens = 1024  # tokens
    global_batch: Sequences = 8  # sequences per step, over all replicas
    micro_batch: Sequences = 1  # sequences per replica and forward pass
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    # auto: flash-attn where it is installed, on a GPU and in half precision, else PyTorch's own fused kernel (sdpa).
    attention: Literal["auto", "flash_attn", "sdpa"] = "auto"
    # Blocks go through `torch.compile`: minutes at the start, and a compiler must be there; not with ZeRO-3.
    compile: bool = False
    # What the backward pass computes again. loop: everything inside a loop. selective: of attention what is made from
    # the latents (GQA: from q, k, v), of an FFN what is made from its input.
    recompute: Literal["none", "loop", "selective"] = "none"
    recompute_every: Loops = 1  # with recompute=loop: of so many loops only the state before the first is kept
    eval_every: StepsOrOff = 0  # steps between held-out losses; 0: only before the first and after the last step
    # Held-out sequences per evaluation, at most; 0: no evaluation.
    eval_samples: Annotated[int, Range(0, 1 << 30)] = 64


@dataclass(frozen=True)
class OptimConfig(Section, section="optim"):
    """AdamW, linear warm-up, then a cosine to `lr * min_lr_ratio` at the last step."""

    lr: Weight = 3e-4
    min_lr_ratio: Annotated[float, Range(0, 1, words="must lie between 0 and 1")] = 0.1
    warmup_steps: StepsOrOff = 100
    beta1: Momentum = 0.9
    beta2: Momentum = 0.95
    eps: Above0 = 1e-8
    weight_decay: Weight = 0.1  # on matrices only: no norm, injection, halting, bias or embedding decays
    grad_clip: Weight = 1.0  # largest global gradient norm; 0: no clipping

    @staticmethod
    def decays(name: str) -> bool:
        """Whether weight decay acts on a parameter, by its canonical name; the depth LoRA's scale is an embedding."""
        kept = ("norm.weight", "injection.", "act.", "bias", "embed.", "lora.scale")
        return not any(part in name for part in kept)


@dataclass(frozen=True)
class DataConfig(Section, section="data"):
    path: PathText = ""  # a folder of MDS shards with manifest.json
    # Instead of `path`: several such folders with their weights, such as {shards/web: 0.7, shards/code: 0.3}. Every
    # stretch of training holds them in this ratio of samples; a corpus that runs out starts its next epoch.
    mix: dict[str, MixWeight] | None = None
    tokenizer: PathText | None = None  # None: the one that lies with the shards
    document_mask: bool = True  # attention stays inside a document
    workers: Annotated[int, Range(0, 1024)] = 0  # loader processes per rank
    verify: bool = True  # each process checks a shard's hash when it first reads it; false: for storage that does so
    # Where compressed shards are unpacked, by each machine and for ever: it needs room for all of them.
    cache: PathText | None = None  # None: a folder in the system's temporary folder

    @property
    def folders(self) -> dict[str, float]:
        """The folders of shards with their weights; `path` is the mix of one."""
        return {self.path: 1.0} if self.mix is None else self.mix


@dataclass(frozen=True)
class CheckpointConfig(Section, section="checkpoint"):
    every: Steps = 100  # steps; the last step is always saved
    keep: Annotated[int, Range(1, 10**6)] = 2  # newest checkpoints that stay on disk
    pin: tuple[Steps, ...] = ()  # steps whose checkpoints are saved and stay, besides the newest
    pin_every: StepsOrOff = 0  # every so many steps likewise; 0: none
    # Training waits for a copy in host memory only (which then takes 12 bytes per parameter / replica); false: until
    # all is on disk.
    background: bool = True
    verify: bool = True  # read every byte and compare hashes before loading; false: compare sizes only
    # A file with a key: checkpoints are signed with it, and others are refused (docs/security.md). None: the file that
    # the variable MYTHOS_CHECKPOINT_KEY_FILE names, if it is set.
    key_file: PathText | None = None


@dataclass(frozen=True)
class RunConfig(Section, section="run"):
    dir: PathText = "runs/mythos"
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    wandb: Literal["offline", "online", "disabled"] = "offline"
    # Adds `communication` to each step's line: bytes of all ranks' messages by axis and kind. It slows CPU steps down.
    count_communication: bool = False
    # Peak of one rank in TFLOP/s, what `mfu` is a share of; None: known GPUs by name, a CPU is measured at the start.
    peak_tflops: Annotated[float, Range(0, above=True, advice=", or null to find it out")] | None = None
    # Seconds after which the run ends its step, saves and leaves with exit code 85; None: no limit. Leave room below
    # the scheduler's own limit for one step and one checkpoint.
    max_seconds: Annotated[float, Range(0, 10**9, above=True, advice=", or null for no limit")] | None = None
    # A file such as configs/clusters/h100_80gb.yaml: what a rank may hold, and how long a step should take. None:
    # memory is that of this machine, and no step time is planned.
    cluster: PathText | None = None
    check_memory: bool = True  # a layout that cannot fit by plan is refused; false: it starts all the same


@dataclass(frozen=True)
class FaultsConfig(Section, section="faults"):
    """When a run gives up waiting, and what it does about gradients that are of no use."""

    join_within: Seconds = 300  # seconds in which every rank must report when the run starts
    hang_after: Seconds = 600  # seconds that a step (or loading, evaluating, saving) may take before it counts as hung
    lost_after: Seconds = 30  # seconds without a sign of life after which a rank counts as lost
    preflight: bool = True  # before the model is built every node is checked, and messages between them are
    clock_skew: Annotated[float, Range(0, 10**8)] = 5  # seconds that clocks of nodes may differ
    retry: bool = True  # a step with gradients that are not finite is computed once more before it is skipped
    # A step is skipped whose gradient norm is more than so many times the median of the last 100; 0: only steps with
    # gradients that are not finite.
    spike_factor: Weight = 0
    # So many skipped steps in a row: back to the last checkpoint, past their batches.
    roll_back_after: Annotated[int, Range(1, 10**6)] = 3
    max_rollbacks: Count = 3  # one more and the run ends with exit code 5
    inject: str = ""  # faults on order, for drills: mythos_dist/ops/cluster/inject.py


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: MythosConfig = field(default_factory=MythosConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    act: ActConfig = field(default_factory=ActConfig)
    loops: LoopsConfig = field(default_factory=LoopsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    def __post_init__(self) -> None:
        """Raises UserError for a section of another type, such as the dict that YAML would give."""
        wrong = [
            f"{one.name}={show(value)}: expected an instance of {one.type.__name__}"  # pyright: ignore[reportAttributeAccessIssue]
            for one in fields(self)
            if type(value := getattr(self, one.name)) is not one.type
        ]
        if wrong:
            raise UserError(wrong)
