"""What users of transformers do: generate, beam search, PEFT, recomputation, placement, mixed precision."""

import pytest
import torch
from helpers.huggingface import WIDTHS, close, save_run, tokens
from safetensors.torch import load_file

from mythos_dist.checkpoint.export import export
from mythos_dist.checkpoint.exported import open_model_folder
from mythos_dist.checkpoint.restore import load_model, open_checkpoint
from mythos_dist.config.schema import ActConfig, Config, MythosConfig
from mythos_dist.model import Mythos

pytestmark = pytest.mark.launch  # transformers is 4 seconds of imports
KINDS = {
    "mla": MythosConfig(**WIDTHS),
    "gqa": MythosConfig(**WIDTHS, attn_type="gqa", n_kv_heads=2),
    "reference": MythosConfig(**WIDTHS, mode="reference"),
    "shared": MythosConfig(**WIDTHS, kv_sharing="every:2"),
}
# Without token 0, which pads: `generate` takes it for padding in prompts.
PROMPTS = tokens(3, 7).clamp(min=1)
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, build_pair):
    return build_pair(KINDS[request.param])


@pytest.mark.parametrize("loops", [1, 4])
def test_greedy_generation_is_that_of_our_module(pair, loops):
    ours, theirs = pair
    expected = ours.generate(PROMPTS, 8, n_loops=loops, temperature=0)
    assert torch.equal(theirs.generate(PROMPTS, num_loops=loops, **GREEDY), expected)


def test_padded_prompts_generate_what_single_ones_do(pair):
    _, theirs = pair
    prompts = PROMPTS[:2]
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0
    batch = theirs.generate(prompts, attention_mask=mask, num_loops=2, **GREEDY)
    assert torch.equal(batch[:1, 4:], theirs.generate(prompts[:1, 4:], num_loops=2, **GREEDY))
    assert torch.equal(batch[1:], theirs.generate(prompts[1:], num_loops=2, **GREEDY))


def test_beam_search_is_the_same_with_and_without_cache(pair):
    """Beams reorder the rows of the cache. Their scores are the log-likelihoods of uncached passes."""
    _, theirs = pair
    prompts = PROMPTS[:2]
    settings = {**GREEDY, "num_beams": 4, "num_loops": 3, "return_dict_in_generate": True, "output_scores": True}
    cached, uncached = (theirs.generate(prompts, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    with torch.no_grad():
        logits = theirs(cached.sequences, num_loops=3).logits[:, 6:-1].log_softmax(-1)
    likelihood = logits.gather(-1, cached.sequences[:, 7:, None]).sum((1, 2)) / 8
    close(cached.sequences_scores, likelihood)


def test_assisted_generation_crops_the_cache(pair):
    """The model drafts for itself; its tokens are those of greedy generation."""
    _, theirs = pair
    expected = theirs.generate(PROMPTS[:1], **GREEDY)
    assert torch.equal(theirs.generate(PROMPTS[:1], assistant_model=theirs, **GREEDY), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_gradients(pair, reentrant):
    """Also the kind that sees gradients through positional arguments only."""
    _, theirs = pair
    theirs.train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            theirs.gradient_checkpointing_enable({"use_reentrant": reentrant})
        theirs.zero_grad()
        theirs(tokens(2, 9), labels=tokens(2, 9), num_loops=3).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None})
    theirs.gradient_checkpointing_disable()
    theirs.eval()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


def test_bf16_autocast_trains(pair):
    """The loss is near that of fp32, and every gradient finite."""
    _, theirs = pair
    theirs.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = theirs(tokens(2, 9), labels=tokens(2, 9), num_loops=2).loss
    loss.backward()
    exact = theirs.eval()(tokens(2, 9), labels=tokens(2, 9), num_loops=2).loss
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    assert all(bool(p.grad.isfinite().all()) for p in theirs.parameters() if p.grad is not None)


@pytest.fixture(scope="module")
def exported(build_pair, tmp_path_factory):
    """A folder of the class for transformers."""
    folder = tmp_path_factory.mktemp("use")
    config = Config(model=KINDS["mla"], act=ActConfig(mode="safe"))
    ours, _ = build_pair(config.model, config.act)
    save_run(folder / "run", ours, config)
    export(open_checkpoint(folder / "run"), folder / "out", "hf")
    return folder / "out"


def load(folder, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


OFFLOADED = dict.fromkeys(("model.embed", "model.prelude", "model.norm", "lm_head"), "cpu")
OFFLOADED |= dict.fromkeys(("model.recurrent", "model.coda"), "disk")


@pytest.mark.parametrize("device_map", ["auto", OFFLOADED], ids=["auto", "offloaded"])
def test_placed_and_offloaded_models_compute_the_same(exported, device_map, tmp_path):
    """Weights on disk are read when their module runs."""
    with torch.no_grad():
        expected = load(exported)(tokens(2, 9), num_loops=3).logits
        placed = load(exported, device_map=device_map, offload_folder=tmp_path)
        close(placed(tokens(2, 9), num_loops=3).logits, expected)
    assert torch.equal(placed.generate(PROMPTS, **GREEDY), load(exported).generate(PROMPTS, **GREEDY))


@pytest.mark.parametrize("targets", [["q_up", "kv_up", "wo", "gate", "up", "down"], "all-linear"])
def test_a_lora_trains_merges_and_comes_back(exported, targets, tmp_path):
    """Only adapters change in training; the merged weights, imported, give the adapted model's logits in our module."""
    from peft import LoraConfig, get_peft_model

    base = load(exported)
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    trainable = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, 1e-2)
    losses = []
    for _ in range(6):
        loss = tuned(input_ids=tokens(2, 9), labels=tokens(2, 9), num_loops=2).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    changed = {name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    with torch.no_grad():
        expected = tuned.eval()(input_ids=tokens(2, 9), num_loops=2).logits
    tuned.merge_and_unload().save_pretrained(tmp_path / "tuned")
    export(open_model_folder(tmp_path / "tuned"), tmp_path / "back", "safetensors")
    model, _, step = load_model(tmp_path / "back")
    with torch.no_grad():
        close(model(tokens(2, 9), 2), expected)
    original = load_file(exported / "model.safetensors")
    state = model.state_dict()
    same = {name for name in state if torch.equal(state[name], original[f"model.{name}"])}
    assert "embed.weight" in same and "recurrent.block.ffn.experts.w1" in same and step == 7


def test_the_trainer_trains_evaluates_and_its_folder_comes_back(exported, tmp_path):
    """Its evaluation is the cross entropy of our module with the weights that it has saved."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": tokens(9, seed=i), "labels": tokens(9, seed=i)} for i in range(4)]
    for one in data:
        one["labels"][0] = -100  # no token predicts it, but the trainer counts it
    settings = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "learning_rate": 1e-3, "max_steps": 2}
    arguments = TrainingArguments(
        str(tmp_path / "trainer"), **settings, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    model = load(exported)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    ours = Mythos.from_pretrained(tmp_path / "tuned")
    assert not torch.equal(ours.embed.weight, load(exported).model.embed.weight)
    input_ids = torch.stack([one["input_ids"] for one in data])
    with torch.no_grad():
        logits = ours(input_ids, model.config.num_loops)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())
    close(torch.tensor(trainer.evaluate()["eval_loss"]), expected)


def test_a_lora_attaches_to_the_stacked_experts(exported):
    """PEFT's target_parameters."""
    from peft import LoraConfig, get_peft_model

    names = [f"recurrent.block.ffn.experts.{one}" for one in ("w1", "w2", "w3")]
    tuned = get_peft_model(load(exported), LoraConfig(r=2, target_modules=["wo"], target_parameters=names))
    tuned(input_ids=tokens(2, 9), labels=tokens(2, 9), num_loops=2).loss.backward()
    assert any("experts" in name and p.grad is not None for name, p in tuned.named_parameters())
