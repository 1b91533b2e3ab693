"""Pretrained models of transformers cut into looped ones: one loop is the original, and what is refused.

Reference: transformers' own classes with random weights, saved by save_pretrained.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_run import REPOSITORY
from torch import Tensor

from mythos_dist.checkpoint.export import export
from mythos_dist.checkpoint.exported import open_model_folder
from mythos_dist.checkpoint.retrofit import Cut, PretrainedWeights, Upcycling, retrofit
from mythos_dist.config.load import load_config
from mythos_dist.errors import UserError
from mythos_dist.model import Mythos

pytestmark = pytest.mark.launch  # transformers is 4 seconds of imports

SMALL: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=44, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-4, rope_theta=100.0, tie_word_embeddings=True,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=32)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
FAMILIES: dict[str, tuple[str, dict[str, Any], Cut]] = {
    "llama": ("Llama", {}, Cut(1, 1, 3, 1)),
    "llama, a head of its own": ("Llama", dict(tie_word_embeddings=False), Cut(1, 1, 3, 1)),
    "llama, wide heads": ("Llama", dict(head_dim=12), Cut(0, 0, 4, 0)),
    "llama, yarn": ("Llama", dict(rope_scaling=YARN), Cut(2, 2, 2, 2)),
    "llama 3.1": ("Llama", dict(rope_scaling=LLAMA3, tie_word_embeddings=False), Cut(1, 1, 3, 1)),
    "mistral": ("Mistral", dict(sliding_window=None), Cut(1, 1, 4, 0)),
    "qwen2": ("Qwen2", {}, Cut(1, 1, 2, 2)),
    "qwen3": ("Qwen3", dict(head_dim=16), Cut(2, 2, 3, 1)),
    "mixtral": ("Mixtral", dict(num_local_experts=6, num_experts_per_tok=2, sliding_window=None), Cut(0, 0, 4, 0)),
    "qwen3 moe": (
        "Qwen3Moe",
        dict(head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True,
             mlp_only_layers=[0, 4]),
        Cut(1, 1, 3, 1),
    ),
}  # fmt: skip


@torch.no_grad()
def save_original(folder: Path, family: str, **changed: Any) -> Any:
    """A model of transformers with weights for which every tensor matters, in eval mode, saved to `folder`."""
    import transformers

    name, settings, _ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SMALL | settings | changed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(5)
    for key, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        matrix = 0.7 * noise / value.shape[-1] ** 0.5
        value.copy_(1 + 0.3 * noise if "norm" in key else 0.5 * noise if key.endswith("bias") else matrix)
    model.save_pretrained(folder)
    return model


def tokens() -> Tensor:
    return torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(1))


def retrofitted(folder: Path, out: Path, cut: Cut, **options: Any) -> Mythos:
    retrofit(PretrainedWeights(folder, cut, loops=3, **options), out)
    return Mythos.from_pretrained(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_loop_computes_what_the_original_does(family, tmp_path):
    """Logits to 1e-5 of the largest; more loops compute something else. With the injection as without it."""
    original = save_original(tmp_path / "original", family)
    with torch.no_grad():
        expected = original(tokens()).logits
        for injection in ("difference", "none"):
            cut = FAMILIES[family][2]
            model = retrofitted(tmp_path / "original", tmp_path / injection, cut, injection=injection)
            scale = expected.abs().max()
            torch.testing.assert_close(model(tokens(), 1) / scale, expected / scale, rtol=0, atol=1e-5)
            assert (model(tokens(), 2) - expected).abs().max() > 0.01 * scale


def test_a_model_of_several_files_and_a_stretch_of_layers(tmp_path):
    """The original in small files; layers that are left out are reported, and the rest is a shorter model."""
    import transformers

    save_original(tmp_path / "original", "llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    notes: list[str] = []
    weights = PretrainedWeights(tmp_path / "sharded", Cut(1, 2, 3, 1), loops=2)
    retrofit(weights, tmp_path / "out", report=notes.append)
    assert "layers [1] of the original are left out" in notes[0]
    shorter = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "original")
    del shorter.model.layers[1]
    for i, layer in enumerate(shorter.model.layers):
        layer.self_attn.layer_idx = i
    with torch.no_grad():
        expected = shorter(tokens(), use_cache=False).logits
        torch.testing.assert_close(Mythos.from_pretrained(tmp_path / "out")(tokens(), 1), expected, rtol=0, atol=1e-4)


def test_copies_of_a_dense_ffn_are_one_loop_of_the_original_until_noise_is_added(tmp_path):
    """Upcycling: any router gives weights that sum to 1."""
    expected = save_original(tmp_path / "original", "qwen2")(tokens()).logits
    cut = FAMILIES["qwen2"][2]
    copies = retrofitted(tmp_path / "original", tmp_path / "copies", cut, upcycling=Upcycling(6, 2))
    noisy = retrofitted(tmp_path / "original", tmp_path / "noisy", cut, upcycling=Upcycling(6, 2, 0.1))
    for model in (copies, noisy):
        assert (model.config.n_experts, model.config.n_experts_per_tok) == (6, 2)
    scale = expected.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(copies(tokens(), 1) / scale, expected / scale, rtol=0, atol=1e-5)
        assert 1e-3 < (noisy(tokens(), 1) - expected).abs().max() / scale < 1
    w1 = noisy.recurrent.block.ffn.experts.w1
    differences = (w1 - copies.recurrent.block.ffn.experts.w1).flatten(1)
    deviation = copies.recurrent.block.ffn.experts.w1[0].std()
    torch.testing.assert_close(differences.std(1) / deviation, torch.full((6,), 0.1), rtol=0.1, atol=0)


def test_slices_of_a_dense_ffn_are_one_loop_of_the_original_if_a_token_gets_all(tmp_path):
    """Each hidden channel is in one expert; with half of the experts a token gets about the original's output."""
    expected = save_original(tmp_path / "original", "llama")(tokens()).logits
    cut, folder = FAMILIES["llama"][2], tmp_path / "original"
    slices = retrofitted(folder, tmp_path / "all", cut, upcycling=Upcycling(4, 4, slices=True))
    half = retrofitted(folder, tmp_path / "half", cut, upcycling=Upcycling(4, 2, slices=True))
    (whole,) = retrofitted(folder, tmp_path / "one", cut).recurrent.block.ffn.experts.w1
    experts = slices.recurrent.block.ffn.experts
    assert torch.equal(torch.cat(list(experts.w1)), whole) and experts.w2.shape == (4, 11, 32)
    scale = expected.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(slices(tokens(), 1) / scale, expected / scale, rtol=0, atol=1e-5)
        assert 1e-3 < (half(tokens(), 1) - expected).abs().max() / scale < 1
    with pytest.raises(UserError, match="44 hidden channels of an FFN do not divide by it; the nearest that does is 4"):
        PretrainedWeights(folder, cut, loops=2, upcycling=Upcycling(5, 2, slices=True))


REFUSED = {
    "another family": (dict(model_type="gpt2"), "model_type='gpt2' is not supported; supported: llama, "),
    "deepseek": (dict(model_type="deepseek_v3"), "model_type='deepseek_v3' is not supported"),
    "activation": (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    "biases": (dict(attention_bias=True, mlp_bias=True), "attention_bias=True"),
    "positions": (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "rope_type='dynamic'"),
    "window": (dict(model_type="mistral", sliding_window=16), "sliding_window=16"),
    "quantized": (dict(quantization_config={"bits": 4}), "quantization_config="),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_original(folder, "llama")
    return folder


def changed_copy(folder: Path, to: Path, **changed: Any) -> Path:
    """The same weights with another config.json."""
    to.mkdir()
    for file in folder.glob("*.safetensors"):
        (to / file.name).symlink_to(file)
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changed))
    return to


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case, llama, tmp_path):
    changed, message = REFUSED[case]
    with pytest.raises(UserError) as refused:
        PretrainedWeights(changed_copy(llama, tmp_path / "changed", **changed), Cut(1, 1, 3, 1), loops=2)
    assert any(problem.startswith(message) for problem in refused.value.problems)


def test_all_problems_are_in_one_message(llama, tmp_path):
    folder = changed_copy(llama, tmp_path / "changed", hidden_act="gelu", mlp_bias=True)
    with pytest.raises(UserError) as refused:
        PretrainedWeights(folder, Cut(2, 1, 3, 1), loops=2, upcycling=Upcycling(2, 3))
    problems = "\n".join(refused.value.problems)
    for part in ("hidden_act='gelu'", "mlp_bias=True", "parts must not overlap", "--experts-per-token 3 is more than"):
        assert part in problems


def test_weights_that_do_not_fit_the_config_are_named(llama, tmp_path):
    folder = changed_copy(llama, tmp_path / "changed", intermediate_size=45, num_hidden_layers=6)
    with pytest.raises(UserError, match=r"model\.layers\.5\.input_layernorm") as refused:
        PretrainedWeights(folder, Cut(1, 1, 4, 1), loops=2)
    assert "wrong shape of" in str(refused.value) and "[44, 32] instead of [45, 32]" in str(refused.value)


def test_a_head_that_is_not_the_embedding_contradicts_a_tied_one(tmp_path):
    save_original(tmp_path / "original", "llama, a head of its own")
    folder = changed_copy(tmp_path / "original", tmp_path / "changed", tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        PretrainedWeights(folder, Cut(1, 1, 3, 1), loops=2)


def test_mixtures_are_looped_only(tmp_path):
    save_original(tmp_path / "original", "qwen3 moe")
    with pytest.raises(
        UserError, match=r"layers \[1\] are mixtures of experts, and FFNs of prelude and coda are dense"
    ):
        PretrainedWeights(tmp_path / "original", Cut(2, 2, 3, 1), loops=2)
    with pytest.raises(UserError, match="some of the looped layers are mixtures"):
        PretrainedWeights(tmp_path / "original", Cut(0, 0, 3, 1), loops=2)


def test_the_config_is_one_to_train_with(llama, tmp_path):
    retrofit(PretrainedWeights(llama, Cut(1, 1, 3, 1), loops=3), tmp_path / "out")
    config = load_config(tmp_path / "out" / "train.yaml", ["data.path=none", f"run.dir={tmp_path / 'run'}"])
    assert config.model == Mythos.from_pretrained(tmp_path / "out").config
    assert (config.loops.curriculum, config.loops.mean, config.model.loop_layers) == ("linear", 3, 3)


@pytest.mark.long
def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    """docs/retrofit.md as it is, with the sample's shards."""
    page = (REPOSITORY / "docs" / "retrofit.md").read_text()
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code, {})
    blocks = re.findall(r"^```(\S*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    for command in "".join(block for kind, block in blocks if not kind).splitlines():
        if command.startswith("make "):  # a study of minutes: experiments/test_retrofit.py
            continue
        program, *arguments = command.split()
        assert program == "mythos"
        result = subprocess.run(
            [sys.executable, "-m", "mythos_dist", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, (command, result.stdout[-2000:], result.stderr[-2000:])
    rows = [json.loads(line) for line in (tmp_path / "runs/looped/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20 and rows[0]["n_loops"] <= 4


def test_a_head_of_its_own_is_exported_for_transformers_and_comes_back(tmp_path):
    """Logits of the class that the export carries, and the same bits when it is read again."""
    from transformers import AutoModelForCausalLM

    save_original(tmp_path / "original", "llama, a head of its own")
    ours = retrofitted(tmp_path / "original", tmp_path / "ours", Cut(1, 1, 3, 1))
    export(open_model_folder(tmp_path / "ours"), tmp_path / "hf", "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens(), num_loops=2).logits, ours(tokens(), 2), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "saved")
    for folder in ("hf", "saved"):
        again = Mythos.from_pretrained(tmp_path / folder).state_dict()
        assert again.keys() == ours.state_dict().keys()
        assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())
    export(open_model_folder(tmp_path / "saved"), tmp_path / "back", "safetensors")
    assert torch.equal(Mythos.from_pretrained(tmp_path / "back").unembed.weight, ours.unembed.weight)
