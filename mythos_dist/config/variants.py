"""The seven variants of OpenMythos 0.5.0, for `model.variant`.

Source: `open_mythos.variants` of that release; a test compares every value with it.

Decisions: PLAN-5.
"""

_COLUMNS = (
    "dim n_heads n_kv_heads max_loop_iters prelude_layers coda_layers kv_lora_rank q_lora_rank qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim n_experts n_experts_per_tok n_shared_experts expert_dim vocab_size max_seq_len "
    "rope_theta lora_rank max_output_tokens"
).split()

_ROWS = {
    "1b": (2048, 16, 4, 16, 2, 2, 256, 512, 32, 64, 64, 64, 4, 2, 2048, 32000, 4096, 5e5, 8, 4096),
    "3b": (3072, 24, 6, 16, 2, 2, 384, 768, 32, 96, 96, 64, 4, 2, 4096, 32000, 4096, 5e5, 8, 4096),
    "10b": (4096, 32, 8, 24, 2, 2, 512, 1024, 64, 128, 128, 128, 4, 2, 5632, 32000, 8192, 5e5, 16, 4096),
    "50b": (6144, 48, 8, 32, 3, 3, 512, 1536, 64, 128, 128, 256, 4, 4, 9728, 32000, 8192, 5e5, 32, 4096),
    "100b": (8192, 64, 8, 32, 4, 4, 512, 2048, 64, 128, 128, 256, 8, 4, 13568, 32000, 1000000, 1e6, 64, 131072),
    "500b": (12288, 96, 16, 48, 4, 4, 1024, 3072, 64, 128, 128, 512, 8, 8, 23040, 100000, 1000000, 1e6, 128, 131072),
    "1t": (16384, 128, 16, 64, 6, 6, 1024, 4096, 64, 128, 128, 512, 8, 8, 34560, 100000, 1000000, 2e6, 256, 131072),
}

VARIANTS: dict[str, dict[str, int | float | str]] = {
    name: {**dict(zip(_COLUMNS, row, strict=True)), "attn_type": "mla", "act_threshold": 0.99}
    for name, row in _ROWS.items()
}
