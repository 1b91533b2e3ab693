"""Conversations as text and tokens, against transformers' apply_chat_template and the messages themselves."""

import json
import logging
from typing import Any

import numpy as np
import pytest

from experiments.chat_task import END, EOS, TEMPLATE, write_byte_tokenizer
from mythos_dist.data.chat import ChatRenderer, encode, messages_of
from mythos_dist.data.chat_template import PLAIN, find_renderer
from mythos_dist.data.manifest import ChatTemplate
from mythos_dist.data.tokenizer import Tokenizer, any_of
from mythos_dist.errors import UserError

CHATML = """
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
# No prompt for an assistant; other names of roles; EOS after each turn; as of Llama 2.
INSTRUCT = """{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' -%}
{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
{%- else %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}"""
# The end of text follows the last turn only, as of Phi-3.
PHI = """{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "instruct": INSTRUCT, "phi": PHI, "own": TEMPLATE}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|system|>")
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "instruct": EOS, "phi": END, "own": END}
CONVERSATION = [
    ("system", "Answer.\n\nBe kind."),
    ("user", "Hello, I'm  naïve 日本 <b>"),
    ("assistant", "Hi!\n\n🙂  there"),
    ("user", " x = y+1;"),
    ("assistant", "It's 12345.\n"),
]


def messages(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.fixture(params=TEMPLATES)
def chat(request, tmp_path):
    """A template's name, a tokenizer that has it, and its renderer."""
    file = write_byte_tokenizer(tmp_path, TEMPLATES[request.param], SPECIAL)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<s>"}))
    tokenizer = Tokenizer.load(file)
    return request.param, tokenizer, find_renderer(tokenizer, None)


def test_tokens_are_those_of_transformers(chat):
    """Up to the end of the last turn; and the prompt of the next one."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it asks for PyTorch
    from transformers import PreTrainedTokenizerFast

    name, tokenizer, renderer = chat
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer.path), chat_template=TEMPLATES[name], bos_token="<s>", eos_token=EOS
    )
    conversation = messages(CONVERSATION)
    tokens, _ = encode(tokenizer, renderer.pieces(conversation))
    expected: Any = reference.apply_chat_template(conversation)
    assert tokens.tolist() == expected[: len(tokens)]
    assert reference.decode(expected[len(tokens) :]).strip("\n") in ("", EOS)
    conversation.append({"role": "user", "content": "And now?"})
    prompt, in_loss = encode(tokenizer, renderer.prompt(conversation))
    assert prompt.tolist() == reference.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt[: len(tokens)].tolist() == tokens.tolist() and not in_loss[len(tokens) :].any()


def test_what_assistants_say_is_in_the_loss_and_nothing_else(chat):
    """Decoded, runs of tokens in the loss are the assistants' messages, each with the token that ends its turn."""
    name, tokenizer, renderer = chat
    tokens, in_loss = encode(tokenizer, renderer.pieces(messages(CONVERSATION)))
    edges = np.flatnonzero(np.diff(in_loss, prepend=False, append=False)).reshape(-1, 2)
    said = [tokens[begin:end].tolist() for begin, end in edges]
    end = tokenizer.special_tokens[ENDS[name]]
    assert [run[-1] for run in said] == [end, end]
    texts = [content for role, content in CONVERSATION if role == "assistant"]
    if name == "llama3":
        texts = [text.strip() for text in texts]
    if name == "instruct":
        texts = [" " + text for text in texts]
    assert [tokenizer.decode(run[:-1]) for run in said] == texts
    assert renderer.end_of_turn() == ENDS[name]


@pytest.mark.launch
@pytest.mark.parametrize("name", ["unigram", "bpe"])
def test_a_sentencepiece_model_uses_the_plain_template(name, corpus, tmp_path):
    """Its EOS ends a turn; "</s>" is not text that a message may have."""
    from mythos_dist.prepare.corpus import read_documents
    from mythos_dist.prepare.tokenizer_training import train_tokenizer

    tokenizer = train_tokenizer(read_documents(corpus), tmp_path / "t.model", 600, name)
    with pytest.raises(UserError, match=r"no chat template \(neither tokenizer_config.json.*--template plain"):
        find_renderer(tokenizer, None)
    renderer = find_renderer(tokenizer, PLAIN)
    tokens, in_loss = encode(tokenizer, renderer.pieces(messages(CONVERSATION)))
    assert (
        np.flatnonzero(tokens == tokenizer.eos_id).tolist()
        == np.flatnonzero(np.diff(in_loss, append=False))[1::2].tolist()
    )
    assert tokenizer.decode(tokens[in_loss]) == CONVERSATION[2][1] + CONVERSATION[4][1]
    assert "### user\nHello, I'm  naïve 日本 <b>\n### assistant\n" in tokenizer.decode(tokens[~in_loss])
    with pytest.raises(ValueError, match="message 1 contains the text of the special token </s>"):
        renderer.pieces(messages([("user", "a </s> b"), ("assistant", "x")]))


def test_prompt_and_completion_are_a_message_each():
    assert messages_of({"prompt": "a", "completion": "b", "id": 3}) == messages([("user", "a"), ("assistant", "b")])
    trailing = messages([("user", "a"), ("assistant", "b"), ("user", "c")])
    assert messages_of({"messages": trailing}) == trailing[:2]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"text": "x"}, "no key 'messages', nor 'prompt' and 'completion'; there is: text"),
        ([], "not list"),
        ({"messages": "x"}, "'messages' holds str, not a list"),
        ({"messages": []}, "no assistant message"),
        ({"messages": messages([("user", "x")])}, "no assistant message"),
        ({"messages": [{"role": "user"}]}, "message 1 is not an object with 'role' and 'content'"),
        ({"messages": [*messages([("user", "x")]), "y"]}, "message 2 is not an object"),
        ({"messages": messages([("tool", "x")])}, "message 1 has the role 'tool'; supported are system, user"),
        ({"messages": messages([("user", None)])}, "'content' of message 1 holds NoneType, not text"),
        ({"prompt": "x", "completion": " \n"}, "message 2, of the assistant, is empty"),
        ({"prompt": "x", "completion": ["y"]}, "'completion' holds list, not text"),
    ],
)
def test_a_record_that_is_no_conversation_is_refused(record, problem):
    with pytest.raises(ValueError) as error:
        messages_of(record)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token of the tokenizer after an assistant"),
        (CHATML, "no special token of the tokenizer after an assistant"),  # <|im_end|> is text to this tokenizer
        ("{% for m in messages %}", "the template refuses it (Unexpected end of template"),
        ("{{ raise_exception('only with a system message') }}", "only with a system message"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ strftime_now('%Y') }}<|end|>", "'strftime_now' is undefined"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_once(template, problem, tmp_path):
    (tmp_path / "template.jinja").write_text(template)
    tokenizer = Tokenizer.load(write_byte_tokenizer(tmp_path / "tokenizer", None))
    with pytest.raises(UserError) as error:
        find_renderer(tokenizer, str(tmp_path / "template.jinja"))
    assert problem in str(error.value) and "--template" in str(error.value)


def test_a_template_is_found_in_any_of_the_tokenizers_files(tmp_path):
    file = write_byte_tokenizer(tmp_path, None)
    with pytest.raises(UserError, match=r"neither tokenizer_config.json nor chat_template.jinja.*--template FILE"):
        find_renderer(Tokenizer.load(file), None)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOS}, "chat_template": named}))
    assert find_renderer(Tokenizer.load(file), None).template == ChatTemplate(TEMPLATE, {"eos_token": EOS})
    (tmp_path / "chat_template.jinja").write_text(PHI)
    assert find_renderer(Tokenizer.load(file), None).template.text == PHI
    for name, content in (("nowhere", None), ("bytes", b"\xff")):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="the chat template cannot be read"):
            find_renderer(Tokenizer.load(file), str(tmp_path / name))


def test_a_template_that_changes_earlier_messages_is_refused():
    """Some remove reasoning from all answers but the last, so a model never generates the conversation as it is."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    renderer = ChatRenderer(ChatTemplate(template, {}), (END,))
    once = messages([("user", "a"), ("assistant", "<think>b</think>c")])
    assert renderer.pieces(once)[1].text == "<think>b</think>c<|end|>"
    twice = [*once, *messages([("user", "d"), ("assistant", "e")])]
    for refused in (lambda: renderer.pieces(twice), lambda: renderer.prompt(twice[:3])):
        with pytest.raises(ValueError, match="renders what precedes message 3 differently once that follows"):
            refused()
    with pytest.raises(ValueError, match="renders what precedes message 4 differently once that follows"):
        renderer.pieces([*messages([("system", "f")]), *twice])


def test_a_template_whose_prompt_is_no_part_of_the_answer_names_the_answer():
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    renderer = ChatRenderer(ChatTemplate(template, {}), (END,))
    with pytest.raises(ValueError, match="renders what precedes message 2 differently once that follows"):
        renderer.pieces(messages([("user", "a"), ("assistant", "b")]))


@pytest.mark.parametrize("content", ["e", "end", "assistant", "", " \n", "start_header_id", "|", "a\n\nb "])
@pytest.mark.parametrize("header", ["in the prompt", "in the completion"])
def test_the_end_of_a_turn_is_found_whatever_a_message_says(content, header):
    """Also where it is the name of a role or of a special token."""
    special = ("<|start_header_id|>", "<|end_header_id|>", "<|end|>", EOS)
    template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n{{ m.content }}<|end|>{% endfor %}"
        "{% if not add_generation_prompt %}<|endoftext|>{% elif PROMPT %}"
        "<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
    ).replace("PROMPT", str(header == "in the prompt").lower())
    pieces = ChatRenderer(ChatTemplate(template, {}), special).pieces(messages([("user", "x"), ("assistant", content)]))
    if header == "in the prompt" or content.strip():
        assert "".join(piece.text for piece in pieces).endswith(f"assistant<|end_header_id|>\n{content}<|end|>")


def test_of_special_tokens_that_begin_alike_the_longest_is_one():
    """In a template's text, whatever the order of their ids."""
    for tokens in (("<a>", "<a>b"), ("<a>b", "<a>")):
        assert any_of(tokens).findall("x<a>by<a>c") == ["<a>b", "<a>"]
    assert not any_of(()).findall("x<a>")
