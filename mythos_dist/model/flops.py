"""FLOPs of the model by formula: 2 per multiply-add of every matrix product, nothing else counted.

The halting layer (one column per loop) and readouts after each loop are left out. A training step costs three forward
passes (the backward is two); recomputed activations do not count, so that MFU compares layouts. Attention counts the
causal half of its scores.
"""

from mythos_dist.config.schema import Config, MythosConfig
from mythos_dist.parallel.pipeline import LayerCosts


def _attention_flops(c: MythosConfig, seq_len: int) -> float:
    """Forward FLOPs of one attention layer per token, averaged over a causal sequence."""
    if c.attn_type == "mla":
        kv_dim = c.qk_nope_head_dim + c.v_head_dim
        weights = (
            c.dim * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim)
            + c.n_heads * (c.q_lora_rank * c.head_dim + c.kv_lora_rank * kv_dim)
            + c.n_heads * c.v_head_dim * c.dim
        )
        channels = c.head_dim + c.v_head_dim
    else:
        weights = 2 * c.dim * c.dim + 2 * c.dim * c.n_kv_heads * c.head_dim
        channels = 2 * c.head_dim
    return 2.0 * weights + 2.0 * c.n_heads * channels * (seq_len + 1) / 2


def _dense_block_flops(c: MythosConfig, seq_len: int) -> float:
    return _attention_flops(c, seq_len) + 2.0 * 3 * c.dim * c.ffn_dim


def _loop_flops(c: MythosConfig, seq_len: int) -> float:
    experts = 3 * c.dim * (c.n_experts_per_tok * c.expert_dim + c.shared_dim)
    lora = 2 * c.dim * c.lora_rank * (c.lora != "none")
    return _attention_flops(c, seq_len) + 2.0 * (experts + c.dim * c.n_experts + lora)


def _head_flops(c: MythosConfig) -> float:
    return 2.0 * c.dim * c.vocab_size


def forward_flops_per_token(c: MythosConfig, seq_len: int, n_loops: int) -> float:
    """Forward FLOPs per token of a sequence of seq_len tokens without document boundaries."""
    blocks = (c.prelude_layers + c.coda_layers) * _dense_block_flops(c, seq_len)
    blocks += 2.0 * c.dim * c.dim * (c.injection == "parcae")
    return blocks + n_loops * _loop_flops(c, seq_len) + _head_flops(c)


def train_flops_per_token(c: MythosConfig, seq_len: int, n_loops: int) -> float:
    """FLOPs per token of forward and backward: three times the forward."""
    return 3.0 * forward_flops_per_token(c, seq_len, n_loops)


def stage_costs(config: Config) -> LayerCosts:
    """FLOPs per token that layers really execute in a training step, recomputation included, to balance stages by."""
    c, seq_len = config.model, config.train.seq_len
    loop = _loop_flops(c, seq_len)
    return LayerCosts(
        block=3 * _dense_block_flops(c, seq_len),
        loop=(4 if config.train.recompute == "loop" else 3) * loop,
        no_grad_loop=loop,
        head=3 * _head_flops(c),
    )
