"""The settings of a Mythos model, as `config.json` of an export has them."""

import math
from typing import Any

from transformers.configuration_utils import PretrainedConfig


def yarn_mscale(factor: float, weight: float) -> float:
    """0.1 weight ln(factor) + 1 (YaRN, Peng et al. 2023)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


class MythosPretrainedConfig(PretrainedConfig):
    """Widths, layers and switches of the loops. Fields have mythos_dist's names; transformers' usual names are aliases.

    num_loops: applications of the recurrent block unless `forward` or `generate` get another number (training's mean).
    act_mode: which loop's hidden state the coda gets. off: the last one's; reference and safe: the sum of all, weighted
    by halting probabilities; ponder: the first at which the sum of probabilities reaches act_threshold.
    kv_sharing: all: each loop has its own keys and values; every:k: the first of k loops computes them for all k;
    first: the first loop computes them for all loops.
    injection: how the prelude's output e enters every loop: OpenMythos' (reference), Parcae's, none (h = block(h)) or
    difference (h = block(h + B * (e - h))).
    loop_layers: layers of the looped block.
    norm_eps: of all RMSNorms. dense_dim: hidden width of the FFNs in prelude and coda; 0: dim * 4 // 3.
    gqa_head_dim: channels of a head in GQA; 0: dim / n_heads. qkv_bias: biases of queries, keys and values in GQA.
    key_norm_weight: with qk_norm, the norm of keys has a weight too.
    residual_scale: attention and FFN of the looped block times 1 (init), 1 / sqrt(max_loop_iters) (inverse_sqrt) or
    1 / max_loop_iters (inverse), either divided by sqrt(loop_layers). state_norm: each loop's hidden state is divided
    by its RMS.
    rope_scaling: None, or rope_type (linear, yarn, llama3), factor, original_max_position_embeddings and other fields,
    as transformers' models have them; with mscale_all_dim, MLA scales the softmax as DeepSeek-V3 does.
    mythos_dist: what training needs to continue with these weights (step, tokens, settings of act and loops).
    """

    model_type = "mythos"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        dim: int = 2048,
        n_heads: int = 16,
        n_kv_heads: int = 4,
        max_seq_len: int = 4096,
        max_loop_iters: int = 16,
        num_loops: int | None = None,
        prelude_layers: int = 2,
        coda_layers: int = 2,
        attn_type: str = "mla",
        kv_lora_rank: int = 512,
        q_lora_rank: int = 1536,
        qk_rope_head_dim: int = 64,
        qk_nope_head_dim: int = 128,
        v_head_dim: int = 128,
        n_experts: int = 64,
        n_shared_experts: int = 2,
        n_experts_per_tok: int = 4,
        expert_dim: int = 512,
        act_threshold: float = 0.99,
        act_mode: str = "off",
        rope_theta: float = 500000.0,
        rope_scaling: dict[str, Any] | None = None,
        lora_rank: int = 16,
        max_output_tokens: int = 4096,
        dropout: float = 0.0,
        mode: str = "train",
        loop_signal: bool = False,
        lora: str = "shared",
        injection: str = "parcae",
        initial_state: str = "zero",
        qk_norm: bool = True,
        kv_sharing: str = "all",
        residual_scale: str = "init",
        state_norm: bool = False,
        loop_layers: int = 1,
        norm_eps: float = 1e-6,
        dense_dim: int = 0,
        gqa_head_dim: int = 0,
        qkv_bias: bool = False,
        key_norm_weight: bool = False,
        init: str = "depth_scaled",
        mythos_dist: dict[str, Any] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        settings = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        settings["num_loops"] = num_loops or max_loop_iters
        settings["mythos_dist"] = mythos_dist or {}
        for key, value in settings.items():
            setattr(self, key, value)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Layers that a token passes: those of the recurrent block count once per loop."""
        return self.prelude_layers + self.num_loops * self.loop_layers + self.coda_layers

    @property
    def key_dim(self) -> int:
        """Channels of one query or key head."""
        if self.attn_type == "gqa":
            return self.gqa_head_dim or self.dim // self.n_heads
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the FFNs in prelude and coda."""
        return self.dense_dim or self.dim * 4 // 3

    @property
    def rope_dim(self) -> int:
        """Rotary channels of a head: all in GQA, a part in MLA."""
        return self.key_dim if self.attn_type == "gqa" else self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What products of queries and keys are multiplied by; with MLA and mscale_all_dim as in DeepSeek-V3."""
        scaling, scale = self.rope_scaling or {}, self.key_dim**-0.5
        if self.attn_type == "mla" and scaling.get("mscale_all_dim"):
            scale *= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
        return scale

    @property
    def query_factor(self) -> float:
        """What rotated channels of queries are multiplied by: YaRN's attention factor of queries and that of keys."""
        scaling = self.rope_scaling or {}
        if scaling.get("rope_type") != "yarn":
            return 1.0
        factor = scaling.get("attention_factor")
        if factor is None:
            factor = yarn_mscale(scaling["factor"], 1.0)
            if scaling.get("mscale") and scaling.get("mscale_all_dim"):
                factor = yarn_mscale(scaling["factor"], scaling["mscale"])
                factor /= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"])
        return factor**2

    @property
    def residual_factor(self) -> float:
        """What attention and FFN of the looped block are multiplied by where they are added to its input."""
        if self.residual_scale == "init":
            return 1.0
        of_loops = self.max_loop_iters ** {"inverse_sqrt": -0.5, "inverse": -1.0}[self.residual_scale]
        return of_loops * self.loop_layers**-0.5

    @property
    def kv_loops(self) -> int:
        """Consecutive loops that share keys and values."""
        if self.kv_sharing == "first":
            return 1 << 30
        return int(self.kv_sharing.removeprefix("every:")) if self.kv_sharing.startswith("every:") else 1
