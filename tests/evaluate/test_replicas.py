"""Greedy answers with stop texts: generation ends at the first of them, and the text before it does not change."""

import random
import string
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from lm_eval.models.utils import postprocess_generated_text

from experiments.chat_task import write_byte_tokenizer
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.evaluate.replicas import Replicas
from mythos_dist.evaluate.requests import Prompt
from mythos_dist.model import Mythos, MythosConfig

NEW, LOOPS = 24, 2


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@torch.no_grad()
def drawn_model(vocab_size: int, letters: list[int]) -> Mythos:
    """Its greedy text is of `letters` only: other tokens have logit 0."""
    settings = dict(
        vocab_size=vocab_size, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=64, max_loop_iters=4, prelude_layers=1,
        coda_layers=1, kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=16, lora_rank=4,
    )  # fmt: skip
    model, generator = Mythos(MythosConfig(**settings)), torch.Generator().manual_seed(0)
    for value in model.parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(1 + 0.2 * noise if value.dim() == 1 else 0.7 * noise / value.shape[-1] ** 0.5)
    others = torch.ones(vocab_size, dtype=torch.bool)
    others[letters] = False
    model.embed.weight[others] = 0
    return model.eval()


def test_answers_end_with_the_token_that_completes_a_stop_text(group, tmp_path):
    """Of each answer some characters are a stop text; another one, which would come later, changes nothing."""
    tokenizer, draw = Tokenizer.load(write_byte_tokenizer(tmp_path)), random.Random(0)
    letters = tokenizer.encode(string.ascii_lowercase).tolist()
    model = drawn_model(tokenizer.vocab_size, letters)
    prompts = [draw.choices(letters, k=length) for length in (3, 3, 3, 7)]
    wanted, expected = [], []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt]), NEW, n_loops=LOOPS, temperature=0, stop_token=tokenizer.eos_id)[
            0, len(prompt) :
        ].tolist()
        tokens = tokens[: tokens.index(tokenizer.eos_id)] if tokenizer.eos_id in tokens else tokens
        text = tokenizer.decode(tokens)
        first = draw.randrange(2, len(text) // 2)
        stops = (text[-3:], text[first : first + 2], "never in it")
        wanted.append(Prompt(prompt, NEW, stops))
        expected.append((tokens, postprocess_generated_text(text, list(stops), None)))
    backend = Replicas(model, tokenizer)
    found: dict[int, list[int]] = {}
    plain: dict[int, list[int]] = {}
    for batches in backend.plan_prompts(wanted):
        without = [[wanted[i]._replace(stop=()) for i in batch] for batch in batches]
        for batch, answers, all_tokens in zip(
            batches,
            backend.generate([[wanted[i] for i in batch] for batch in batches], LOOPS),
            backend.generate(without, LOOPS),
            strict=True,
        ):
            found |= dict(zip(batch, answers, strict=True))
            plain |= dict(zip(batch, all_tokens, strict=True))
    for i, (tokens, text) in enumerate(expected):
        stops = wanted[i].stop
        assert plain[i] == tokens
        assert found[i] == tokens[: len(found[i])] and len(found[i]) < len(tokens)
        assert postprocess_generated_text(tokenizer.decode(found[i]), list(stops), None) == text
        assert not any(stop in tokenizer.decode(found[i][:-1]) for stop in stops), "one token fewer has no stop text"


def test_prompts_with_other_stop_texts_are_other_requests():
    """A cache holds the tokens up to the stop text."""
    keys = {Prompt([1, 2], 3, stop).key for stop in ((), ("a",), ("b",), ("a", "b"), ("ab",))}
    assert len(keys) == 5
