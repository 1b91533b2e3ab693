"""Conversations with a model: prompts as in training, answers up to the end of a turn, and history."""

import pytest
import torch

from experiments.chat_task import write_byte_tokenizer
from mythos_dist.data.chat import encode
from mythos_dist.data.chat_template import find_renderer
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.generate.chat import Chat, complete, prompt_tokens
from mythos_dist.generate.engine import DecodingEngine, Request

CONTEXT = 64


class Echo:
    """In place of a model: repeats the user's last message in capitals and ends its turn, then writes nonsense."""

    def __init__(self, tokenizer):
        self.tokenizer, self.prompts = tokenizer, []

    def answer(self, prompt, stop_token, max_new_tokens):
        self.prompts.append(self.tokenizer._model.decode(prompt, skip_special_tokens=False))
        message = self.prompts[-1].rsplit("<|user|>", 1)[1].removesuffix("<|end|><|assistant|>")
        answer = [*self.tokenizer.encode(message.upper()).tolist(), stop_token, 5, 6, 7] + [stop_token] * max_new_tokens
        return answer[:max_new_tokens]

    def generate(self, tokens, max_new_tokens, stop_token, **options):
        return torch.tensor([[*row, *self.answer(row, stop_token, max_new_tokens)] for row in tokens.tolist()])


class EchoEngine:
    """An engine of an `Echo`, which adds a token in each step."""

    max_seq_len = CONTEXT

    def __init__(self, tokenizer):
        self.echo, self.steps, self.cancelled = Echo(tokenizer), 0, []

    @property
    def prompts(self):
        return self.echo.prompts

    def submit(self, prompt, sampling):
        self.request = Request(prompt, sampling)
        self.tokens = iter(self.echo.answer(prompt, *sampling.stop_tokens, sampling.max_new_tokens))
        return self.request

    def step(self):
        self.steps += 1
        request = self.request
        request.tokens.append(next(self.tokens))
        if request.tokens[-1] in request.sampling.stop_tokens:
            request.finish_reason = "stop"
        elif len(request.tokens) == request.sampling.max_new_tokens:
            request.finish_reason = "length"
        return [request]

    def cancel(self, request):
        if request.finish_reason is None:
            self.cancelled.append(request)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def renderer(tokenizer):
    return find_renderer(tokenizer, None)


def test_an_answer_ends_with_its_turn_and_is_part_of_the_next_prompt(tokenizer, renderer):
    """A prompt is the conversation as it is rendered for training."""
    model = EchoEngine(tokenizer)
    chat = Chat(model, tokenizer, renderer, system="S", max_new_tokens=9, temperature=0)
    assert [chat.answer("abc"), chat.answer("de f")] == ["ABC", "DE F"]
    assert model.prompts[0] == "<|system|>S<|end|><|user|>abc<|end|><|assistant|>"
    assert model.prompts[1] == model.prompts[0] + "ABC<|end|><|user|>de f<|end|><|assistant|>"
    said = [("system", "S"), ("user", "abc"), ("assistant", "ABC"), ("user", "de f"), ("assistant", "DE F")]
    tokens, _ = encode(tokenizer, renderer.pieces([{"role": role, "content": text} for role, text in said]))
    prompt = prompt_tokens(tokenizer, renderer, [{"role": role, "content": text} for role, text in said[:-1]])
    assert tokens[: len(prompt)].tolist() == prompt
    assert chat.answer("a long message") == "A LONG ME", "an answer has at most max_new_tokens"


def test_an_answer_is_streamed_as_it_is_made(tokenizer, renderer):
    """Each piece after one step of the engine. One that is not read to its end is cancelled, and not remembered."""
    engine = EchoEngine(tokenizer)
    chat = Chat(engine, tokenizer, renderer, max_new_tokens=20)
    pieces = [(piece, engine.steps) for piece in chat.stream("abcd")]
    assert pieces == [("A", 1), ("B", 2), ("C", 3), ("D", 4)] and engine.steps == 5
    stream = chat.stream("xyz")
    assert next(stream) == "X" and not engine.cancelled
    stream.close()
    assert engine.cancelled == [engine.request]
    chat.answer("again")
    assert "ABCD" in engine.prompts[-1] and "xyz" not in engine.prompts[-1]


def test_characters_of_several_tokens_are_streamed_whole(tokenizer, renderer):
    """Each byte is a token here."""
    chat = Chat(EchoEngine(tokenizer), tokenizer, renderer, max_new_tokens=30)
    assert list(chat.stream("aé🙂")) == ["A", "É", "🙂"]


def test_the_answers_of_a_model_are_those_of_complete(tokenizer, renderer, build):
    """Greedy, over turns, with the engine and without it."""
    model = build(vocab_size=tokenizer.vocab_size, max_seq_len=128)
    engine = DecodingEngine(model, None, n_loops=4, max_batch=1)
    chat, said = Chat(engine, tokenizer, renderer, max_new_tokens=12, temperature=0), []
    for word in ("ab", "cde"):
        said.append({"role": "user", "content": word})
        prompt = prompt_tokens(tokenizer, renderer, said)
        (expected,) = complete(model, tokenizer, renderer, [prompt], max_new_tokens=12, temperature=0, n_loops=4)
        answer = chat.answer(word)
        assert answer == expected.rstrip(
            "\N{REPLACEMENT CHARACTER}"
        )  # a character that the last token leaves incomplete
        said.append({"role": "assistant", "content": answer})


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(tokenizer, renderer):
    model = EchoEngine(tokenizer)
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
