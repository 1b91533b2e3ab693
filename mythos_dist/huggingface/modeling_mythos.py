"""Mythos, a Recurrent-Depth Transformer: embedding, prelude, ONE block applied `num_loops` times, coda, head.

    e = prelude(embed(tokens))
    h = decay * h + scale * injected(e) + u,  u = block(norm(h + e)) + its depth LoRA,  num_loops times

decay in (0, 1) and scale are the A and B of Parcae (Prairie et al. 2026); without injection, h = block(h), and with
that of differences, h = block(h + B * (e - h)). The block
has `loop_layers` layers, whose FFNs are mixtures of experts.
Any number of loops can be asked for: `model(input_ids, num_loops=8)`, `model.generate(..., num_loops=8)`. The trap:
keys and values of a token differ from loop to loop, so the cache grows with loops and belongs to one number of them.

A file of mythos_dist that exports carry; it needs PyTorch 2.5 and transformers 4.56 or later, and nothing else.
"""

# B batch, S new tokens, T all tokens (cached and new), D model, V vocabulary, R rotary channels.

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_mythos import MythosPretrainedConfig as Config
from .layers_mythos import (
    MythosBlock,
    MythosDepthLoRA,
    MythosDifferenceInjection,
    MythosExperts,
    MythosFFN,
    MythosHalting,
    MythosInjection,
    MythosMoE,
    MythosNorm,
    MythosParcaeInjection,
    MythosRouter,
    rope_frequencies,
)

MAX_LOOPS = 512


class MythosCache(DynamicCache):
    """Keys and values (MLA: rotary keys and latents) of every layer and loop.

    Slots: the prelude's layers, then the looped layers of each loop (or group of loops that share keys), then the
    coda's layers; each tensor is (B, heads, T, -).
    """

    num_loops: int | None = None  # of the tokens in the cache

    def begin(self, num_loops: int) -> int:
        """Call once per forward pass. Returns the number of cached tokens; ValueError if they had other loops."""
        past = self.get_seq_length() if self.layers else 0
        if past and self.num_loops != num_loops:
            raise ValueError(
                f"num_loops={num_loops}, but the cache holds keys of {self.num_loops} loops; pass the same num_loops, "
                "or begin with past_key_values=None"
            )
        self.num_loops = num_loops
        return past


class MythosRecurrent(nn.Module):
    """The looped block, and all that depends on the loop."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.adds_e = config.injection in ("reference", "parcae")
        self.norm = MythosNorm(config.dim, config.norm_eps) if self.adds_e else nn.Identity()
        layers = [MythosBlock(config, MythosMoE(config), config.residual_factor) for _ in range(config.loop_layers)]
        self.block = layers[0]  # the others are blocks.1, blocks.2, ...
        self.blocks = nn.ModuleDict({str(i): layers[i] for i in range(1, len(layers))})
        self.lora = None if config.lora == "none" else MythosDepthLoRA(config)
        parcae = config.injection == "parcae"
        self.e_norm = MythosNorm(config.dim, config.norm_eps) if parcae else None
        kinds = {
            "reference": MythosInjection,
            "parcae": MythosParcaeInjection,
            "difference": MythosDifferenceInjection,
        }
        self.injection: Any = kinds[config.injection](config) if config.injection != "none" else None
        self.act = MythosHalting(config)

    def forward(
        self,
        e: Tensor,
        rope: Tensor,
        mask: Tensor | None,
        position_ids: Tensor,
        num_loops: int,
        past_key_values: MythosCache | None = None,
        first_slot: int = 0,
    ) -> tuple[Tensor, list[Tensor]]:
        """The prelude's output e (B, S, D) -> the coda's input, and h after each loop."""
        if self.e_norm is not None:
            e = self.e_norm(e)
        h, (decay, injected) = self.initial_state(e, position_ids), self.injection(e) if self.adds_e else (1.0, 0.0)
        output, cum_halting, states = torch.zeros_like(e, dtype=torch.float32), e.new_zeros(*e.shape[:2], 1).float(), []
        layers = [self.block, *self.blocks.values()]
        kv: list[Any] = []
        for t in range(num_loops):
            group, index = divmod(t, self.config.kv_loops)
            if index == 0:  # this loop computes its own keys and values, which the next ones of the group use
                kv = [(None, None)] * len(layers)
            x = h + e if self.adds_e else h
            if self.config.injection == "difference":
                x = self.injection(h, e)
            if self.config.loop_signal:
                x = x + loop_signal(t, e)
            u, slots = self.norm(x), first_slot + group * len(layers)
            for i, layer in enumerate(layers):
                u, *used = layer(u, rope, mask, *kv[i], past_key_values=past_key_values, slot=slots + i)
                kv[i] = used
            if self.lora is not None:
                u = self.lora(u, t)
            h = decay * h + injected + u if self.adds_e else u
            if self.config.state_norm:
                h = F.rms_norm(h, h.shape[-1:], eps=self.config.norm_eps)
            weight, cum_halting = self.act(h, cum_halting, t == num_loops - 1)
            output = torch.addcmul(output, weight, h.float())
            states.append(h)
        return output.to(e.dtype), states

    def initial_state(self, e: Tensor, position_ids: Tensor) -> Tensor:
        """h before the first loop, like e (B, S, D)."""
        if self.config.initial_state == "e":
            return e
        if self.config.initial_state == "zero":
            return torch.zeros_like(e)
        # N(0, 2 / 5) (Huginn, Geiping et al. 2025), a function of row and position: the same with and without a cache
        # (HF-3 in mythos_dist's DECISIONS.md).
        generator, tokens = torch.Generator(), int(position_ids.max()) + 1
        rows = [
            torch.empty(tokens, e.shape[2]).normal_(0.0, math.sqrt(2 / 5), generator=generator.manual_seed(row))
            for row in range(e.shape[0])
        ]
        noise = torch.stack(rows).to(e.device)
        return noise.gather(1, position_ids.unsqueeze(-1).expand_as(e)).to(e.dtype)


def loop_signal(t: int, like: Tensor) -> Tensor:
    """(D,): sin and cos of t * 10000^(-2i / L) in the first L = D // 8 channels, then zeros."""
    width = like.shape[-1] // 8
    pairs = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    angles = t * 10000.0 ** (-pairs / max(width, 1))
    return F.pad(torch.cat([angles.sin(), angles.cos()])[:width], (0, like.shape[-1] - width)).to(like.dtype)


class MythosPreTrainedModel(PreTrainedModel):
    """What transformers needs to load, save, initialize and place the model."""

    config_class = Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MythosBlock", "MythosRecurrent"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012
    _supports_sdpa = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but the router's bias is offloaded with its weights: of modules on disk, transformers 4.57
        would leave it uninitialized."""
        return super().from_pretrained(*args, **{"offload_buffers": True, **kwargs})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """New weights: N(0, 0.02), ones for norms; of the injection as in its constructor."""
        if isinstance(module, MythosNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, MythosInjection | MythosParcaeInjection):
            module.log_A.zero_()
            if isinstance(module, MythosInjection):
                module.log_dt.zero_()
                module.B.fill_(0.1)
            else:
                module.delta.fill_(math.log(1 / 0.447 - 1))  # decay 0.447
        elif isinstance(module, nn.Linear | nn.Embedding | MythosRouter | MythosExperts | MythosDepthLoRA):
            for name, parameter in module.named_parameters(recurse=False):
                parameter.zero_() if name == "bias" else parameter.normal_(0.0, 0.02)


class MythosModel(MythosPreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        blocks = [MythosBlock(config, MythosFFN(config.dim, config.ffn_dim)) for _ in range(config.prelude_layers)]
        self.prelude = nn.ModuleList(blocks)
        self.recurrent = MythosRecurrent(config)
        blocks = [MythosBlock(config, MythosFFN(config.dim, config.ffn_dim)) for _ in range(config.coda_layers)]
        self.coda = nn.ModuleList(blocks)
        self.norm = MythosNorm(config.dim, config.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        num_loops: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, S), or inputs_embeds (B, S, D) -> last_hidden_state (B, S, D).

        attention_mask: (B, T), 0 for padding on either side of a row; bool (B, 1, S, T) as well.
        position_ids: (B, S); default: the number of earlier tokens of the row that are not padding.
        past_key_values: the MythosCache that an earlier call returned; transformers 5 calls it `cache`.
        num_loops: applications of the recurrent block, 1 to 512; default config.num_loops.
        hidden_states: the embedding, the prelude's output, h after each loop, the last norm's output.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        loops = int(self.config.num_loops if num_loops is None else num_loops)
        if not 1 <= loops <= MAX_LOOPS:
            raise ValueError(f"num_loops={loops} must be at least 1 and at most {MAX_LOOPS}")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        past = 0 if cache is None else cache.begin(loops)
        tokens = past + x.shape[1]
        if tokens > self.config.max_seq_len:
            raise ValueError(f"a sequence of {tokens} tokens is longer than the context, {self.config.max_seq_len}")
        if position_ids is None:
            position_ids = default_positions(x, attention_mask, past)
        mask = build_mask(x, attention_mask, past)
        config: Any = self.config
        frequencies = rope_frequencies(config, x.device)
        rope = position_ids.to(x.device).unsqueeze(-1).float() * frequencies  # (B, S, R / 2)

        states = [x]
        for slot, block in enumerate(self.prelude):
            x = block(x, rope, mask, past_key_values=cache, slot=slot)[0]
        states.append(x)
        slots = len(self.prelude)
        x, loop_states = self.recurrent(x, rope, mask, position_ids, loops, past_key_values=cache, first_slot=slots)
        slots += -(-loops // self.config.kv_loops) * self.config.loop_layers
        for slot, block in enumerate(self.coda, slots):
            x = block(x, rope, mask, past_key_values=cache, slot=slot)[0]
        x = self.norm(x)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states: Any = (*states, *loop_states, x) if wanted else None
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache, hidden_states=hidden_states)

    def _cache(self, given: Any, use_cache: bool | None) -> MythosCache | None:
        """The cache to use, if any: `generate` passes an empty one of another class."""
        checkpoints = self.training and self.is_gradient_checkpointing
        if checkpoints or not (self.config.use_cache if use_cache is None else use_cache):
            return None
        if isinstance(given, MythosCache):
            return given
        if given is not None and given.get_seq_length():
            raise ValueError(
                f"past_key_values is a {type(given).__name__}; expected the MythosCache of an earlier call"
            )
        return MythosCache()


def default_positions(x: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """The positions (B, S) of the tokens x (B, S, -) after `past` cached ones; padding does not count."""
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(past, past + x.shape[1], device=x.device).expand(x.shape[0], -1)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def build_mask(x: Tensor, attention_mask: Tensor | None, past: int) -> Tensor | None:
    """Which of T keys each of the S queries sees, bool (B or 1, 1, S, T); None: all earlier ones."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask.to(x.device)
    S, T = x.shape[1], past + x.shape[1]
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (past == 0 or S == 1):
        return None
    queries, keys = torch.arange(past, T, device=x.device).unsqueeze(1), torch.arange(T, device=x.device)
    mask = (keys <= queries)[None, None]
    if padded:  # padding sees itself: a row of no keys would be NaN
        assert attention_mask is not None
        mask = (mask & attention_mask.bool().to(x.device)[:, None, None, :]) | (keys == queries)
    return mask


class MythosForCausalLM(MythosPreTrainedModel, GenerationMixin):
    """Tokens to logits; the head is the embedding unless `tie_word_embeddings=False`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: Config):
        super().__init__(config)
        self.model = MythosModel(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_loops: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `MythosModel`, and logits (B, S, V): of the last `logits_to_keep` tokens, or of all if it is 0.

        labels: (B, S), the input_ids, with -100 for tokens that are not in the loss; the loss predicts each from those
        before it (mean over labels). It is the cross entropy of the last loop alone.
        """
        outputs: Any = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            num_loops=num_loops,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
