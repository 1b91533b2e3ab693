"""FLOPs of the model by formula: 2 per multiply-add of every matrix product, nothing else counted.

A training step costs three forward passes (the backward is two); recomputed activations do not count, so that `mfu`
compares layouts. Attention counts the causal half of its scores.
"""

from mythos_dist.config.schema import MythosConfig


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


def forward_flops_per_token(c: MythosConfig, seq_len: int, n_loops: int) -> float:
    """Forward FLOPs per token of a sequence of seq_len tokens without document boundaries."""
    attention = _attention_flops(c, seq_len)
    dense = attention + 2.0 * 3 * c.dim * c.ffn_dim
    experts = 3 * c.dim * (c.n_experts_per_tok * c.expert_dim + c.shared_dim)
    loop = attention + 2.0 * (experts + c.dim * c.n_experts + 2 * c.dim * c.lora_rank + c.dim)
    head = 2.0 * c.dim * c.vocab_size
    return (c.prelude_layers + c.coda_layers) * dense + n_loops * loop + head


def train_flops_per_token(c: MythosConfig, seq_len: int, n_loops: int) -> float:
    """FLOPs per token of forward and backward: three times the forward."""
    return 3.0 * forward_flops_per_token(c, seq_len, n_loops)
