"""Exports for transformers: loaded, saved and brought back, every bit is the same; with the tokenizer of training."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.huggingface import WIDTHS, close, redraw, save_run, tokens
from helpers.launch import run_tool
from safetensors.torch import load_file, save_file

from mythos_dist.checkpoint.export import export
from mythos_dist.checkpoint.exported import open_model_folder
from mythos_dist.checkpoint.restore import load_model, open_checkpoint
from mythos_dist.config.schema import ActConfig, Config, LoopsConfig, MythosConfig
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.data.tokenizer_files import tokenizer_in
from mythos_dist.errors import UserError
from mythos_dist.model import Mythos

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.launch  # transformers is 4 seconds of imports
FORMATS = ("safetensors", "hf", "open_mythos")


def tool(name: str, *arguments: object, code: int = 0) -> str:
    result = run_tool(REPOSITORY / "tools" / f"{name}.py", *arguments)
    assert result.codes == [code] and "Traceback" not in result.err, result.err
    return result.out + result.err


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """A run of a model with halting, with held-out losses by number of loops."""
    folder = tmp_path_factory.mktemp("hugging_face") / "story"
    model = MythosConfig(**WIDTHS | {"vocab_size": 512})
    config = Config(model=model, act=ActConfig(mode="safe"), loops=LoopsConfig(mean=2))
    config = replace(config, data=replace(config.data, path=str(shards)))
    weights = Mythos(model, act=config.act)
    redraw(weights)
    save_run(folder, weights, config)
    line = {"step": 7, "heldout_loss": 2.5, "by_loops": {"1": {"loss": 3.25}, "2": {"loss": 2.5}}}
    (folder / "eval.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"step": 9, "heldout_loss": 9}) + "\n")
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "story-hf"
    assert "7: " in tool("export_checkpoint", run, "--out", out, "--format", "hf", "--file-size", 0.00002)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    return out


def load(folder: Path, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_the_class_loads_offline_in_a_process_without_our_package(exported, run, tmp_path):
    """From another folder, isolated from the environment. Its logits are those of the run's model."""
    code = """if True:
        import sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        inputs = tokenizer("def f(x):\\n    return x", return_tensors="pt")
        torch.save({"ids": inputs.input_ids, "logits": model(inputs.input_ids).logits.detach()}, "out.pt")
        generated = model.generate(**inputs, max_new_tokens=3, num_loops=3, do_sample=False)
        assert generated.shape[1] == inputs.input_ids.shape[1] + 3
        assert not [name for name in sys.modules if name.split(".")[0] in ("mythos_dist", "deepspeed")]
    """
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, exported], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "out.pt")
    model, config, _ = load_model(run)
    with torch.no_grad():
        close(result["logits"], model(result["ids"], config.loops.mean_of(config.model)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loaded_and_saved_weights_are_bit_equal(dtype, run, tmp_path):
    """And so are those that are brought back and exported again."""
    first, saved, back, again = (tmp_path / name for name in ("first", "saved", "back", "again"))
    tool("export_checkpoint", run, "--out", first, "--format", "hf", "--dtype", dtype)
    load(first, dtype="auto").save_pretrained(saved)
    assert {path.name for path in first.glob("*.py")} == {path.name for path in saved.glob("*.py")}
    load(saved, dtype="auto").save_pretrained(tmp_path / "saved again")
    tool("import_hf", saved, "--out", back)
    export(open_model_folder(back), again, "hf", dtype=dtype)
    expected = weights_of(first)
    for folder in (saved, tmp_path / "saved again", again):
        found = weights_of(folder)
        assert found.keys() == expected.keys()
        assert all(
            found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
        )
    model, config, step = load_model(back)
    assert (step, config.act.mode, config.loops.mean) == (7, "safe", 2)
    if dtype == "fp32":
        ours = load_model(run)[0].state_dict()
        assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_the_tokenizer_and_loads_in_one_line(format, shards, tmp_path):
    """With the outputs of the run's model."""
    mode = "reference" if format == "open_mythos" else "train"
    model = MythosConfig(**WIDTHS | {"vocab_size": 512}, mode=mode)
    config = Config(model=model)
    weights = Mythos(model)
    redraw(weights)
    save_run(tmp_path / "run", weights, replace(config, data=replace(config.data, path=str(shards))))
    export(open_checkpoint(tmp_path / "run"), tmp_path / "out", format)
    loaded = Mythos.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in weights.state_dict().items())
    with torch.no_grad():
        close(loaded(tokens(2, 9)), weights.eval()(tokens(2, 9)))
    found = tokenizer_in(tmp_path / "out")
    training = Tokenizer.load(shards / "tokenizer.model")
    assert found and found.tokenizer.sha256 == training.sha256
    half = Mythos.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert half.embed.weight.dtype == torch.bfloat16
    assert torch.equal(half.recurrent.block.ffn.router.bias, weights.recurrent.block.ffn.router.bias)


def test_an_export_generates_text_without_a_tokenizer_option(exported):
    assert "[after 7 steps] def f" in tool("generate", exported, "--prompt", "def f", "--max-new-tokens", "4")


def test_the_card_has_the_facts_of_the_run(exported):
    """Losses are those of the checkpoint's step, and no path of this machine is in it."""
    card = (exported / "README.md").read_text()
    for fact in (
        "# story\n",
        "7 steps, 1.23k tokens",
        "| 1 loops | 3.2500 after step 7 |",
        "halting safe",
        "# license:",
    ):
        assert fact in card, card
    assert str(exported.parent) not in card and "/tmp" not in card


def test_an_export_without_shards_says_so_and_takes_a_tokenizer(run, shards, tmp_path):
    config = Config(model=MythosConfig(**WIDTHS | {"vocab_size": 512}))
    config = replace(config, data=replace(config.data, path="/no/such/shards"))
    save_run(tmp_path / "run", Mythos(config.model), config)
    out = tool("export_checkpoint", tmp_path / "run", "--out", tmp_path / "a", "--format", "hf")
    assert "no tokenizer (/no/such/shards: no such folder" in out and "--tokenizer" in out
    tokenizer = shards / "tokenizer.model"
    tool("export_checkpoint", tmp_path / "run", "--out", tmp_path / "b", "--tokenizer", tokenizer)
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_folders_of_other_models_are_refused_by_name(exported, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    save_file({"x": torch.zeros(1)}, other / "model.safetensors")
    for name in ("import_hf", "generate"):
        more = ["--out", tmp_path / "out"] if name == "import_hf" else ["--prompt", "a"]
        assert "model_type='llama' (LlamaForCausalLM) is another model" in tool(name, other, *more, code=2)
    with pytest.raises(UserError, match="another model"):
        Mythos.from_pretrained(other)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    out = tool("import_hf", tmp_path / "adapter", "--out", tmp_path / "out", code=2)
    assert "merge_and_unload" in out and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no such folder"):
        open_model_folder(tmp_path / "missing")


def test_a_head_apart_from_the_embedding_is_refused(exported, tmp_path):
    folder = tmp_path / "untied"
    model = load(exported)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed.weight"] + 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for read in (open_model_folder, Mythos.from_pretrained):
        with pytest.raises(UserError, match=r"lm_head\.weight differs"):
            read(folder)
