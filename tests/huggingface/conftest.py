"""Fixture: a model as our module and as the class for transformers."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from helpers.huggingface import redraw

from mythos_dist.config.schema import ActConfig, MythosConfig
from mythos_dist.model import Mythos
from mythos_dist.model.rope import to_hugging_face


@pytest.fixture(scope="session")
def build_pair() -> Callable[..., tuple[Mythos, Any]]:
    """A function: settings -> (our model, the class for transformers) with the same weights, both in eval mode."""

    def build(config: MythosConfig, act: ActConfig | None = None, seed: int = 0) -> tuple[Mythos, Any]:
        from mythos_dist.huggingface.configuration_mythos import MythosPretrainedConfig
        from mythos_dist.huggingface.modeling_mythos import MythosForCausalLM

        act = act or ActConfig()
        ours = Mythos(config, act=act)
        redraw(ours, seed)
        fields = {**asdict(config), "rope_scaling": to_hugging_face(config.rope_scaling)}
        fields["tie_word_embeddings"] = config.tie_embeddings
        theirs = MythosForCausalLM(MythosPretrainedConfig(**fields, act_mode=act.mode_of(config)))
        names = {"unembed.weight": "lm_head.weight"}
        state = {names.get(name, f"model.{name}"): value for name, value in ours.state_dict().items()}
        keys = theirs.load_state_dict(state, strict=False)
        assert keys.missing_keys == ["lm_head.weight"] * config.tie_embeddings and not keys.unexpected_keys
        theirs.tie_weights()
        return ours.eval(), theirs.eval()

    return build
