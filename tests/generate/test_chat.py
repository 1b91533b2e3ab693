"""Conversations with a model: prompts as in training, answers up to the end of a turn, and history."""

from types import SimpleNamespace

import pytest
import torch

from experiments.chat_task import write_byte_tokenizer
from mythos_dist.data.chat import encode
from mythos_dist.data.chat_template import find_renderer
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.generate.chat import Chat, complete, prompt_tokens

CONTEXT = 64


class Echo:
    """In place of a model: repeats the user's last message in capitals and ends its turn, then writes nonsense."""

    config = SimpleNamespace(max_seq_len=CONTEXT)

    def __init__(self, tokenizer):
        self.tokenizer, self.prompts = tokenizer, []

    def generate(self, tokens, max_new_tokens, stop_token, **options):
        rows = []
        for row in tokens.tolist():
            self.prompts.append(self.tokenizer._model.decode(row, skip_special_tokens=False))
            message = self.prompts[-1].rsplit("<|user|>", 1)[1].removesuffix("<|end|><|assistant|>")
            answer = [*self.tokenizer.encode(message.upper()).tolist(), stop_token, 5, 6, 7] + [
                stop_token
            ] * max_new_tokens
            rows.append([*row, *answer[:max_new_tokens]])
        return torch.tensor(rows)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def renderer(tokenizer):
    return find_renderer(tokenizer, None)


def test_an_answer_ends_with_its_turn_and_is_part_of_the_next_prompt(tokenizer, renderer):
    """A prompt is the conversation as it is rendered for training."""
    model = Echo(tokenizer)
    chat = Chat(model, tokenizer, renderer, system="S", max_new_tokens=9, temperature=0)
    assert [chat.answer("abc"), chat.answer("de f")] == ["ABC", "DE F"]
    assert model.prompts[0] == "<|system|>S<|end|><|user|>abc<|end|><|assistant|>"
    assert model.prompts[1] == model.prompts[0] + "ABC<|end|><|user|>de f<|end|><|assistant|>"
    said = [("system", "S"), ("user", "abc"), ("assistant", "ABC"), ("user", "de f"), ("assistant", "DE F")]
    tokens, _ = encode(tokenizer, renderer.pieces([{"role": role, "content": text} for role, text in said]))
    prompt = prompt_tokens(tokenizer, renderer, [{"role": role, "content": text} for role, text in said[:-1]])
    assert tokens[: len(prompt)].tolist() == prompt
    assert chat.answer("a long message") == "A LONG ME", "an answer has at most max_new_tokens"


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(tokenizer, renderer):
    model = Echo(tokenizer)
    chat = Chat(model, tokenizer, renderer, system="S", max_new_tokens=10)
    for number in range(6):
        assert chat.answer(f"word {number}") == f"WORD {number}"
    assert all(prompt.startswith("<|system|>S<|end|><|user|>") for prompt in model.prompts)
    assert max(len(tokenizer.encode_rendered(prompt, False)) for prompt in model.prompts) + 10 <= CONTEXT
    assert chat.forgotten == 3 and "word 3" in model.prompts[-1] and "word 2" not in model.prompts[-1]
    with pytest.raises(UserError, match="shorten it to leave room for an answer"):
        chat.answer("x" * CONTEXT)
    with pytest.raises(UserError, match=r"contains the text of the special token <\|end\|>"):
        chat.answer("a <|end|>")
    assert chat.answer("again") == "AGAIN"


def test_prompts_of_several_lengths_are_answered_in_order(tokenizer, renderer):
    words = ["a", "bcd", "e", "", "fgh"]
    prompts = [prompt_tokens(tokenizer, renderer, [{"role": "user", "content": word}]) for word in words]
    answers = complete(Echo(tokenizer), tokenizer, renderer, prompts, max_new_tokens=8)
    assert answers == [word.upper() for word in words]
