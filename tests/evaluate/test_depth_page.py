"""Loops of each token of a text, and the page that shows them."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from experiments.chat_task import write_byte_tokenizer
from mythos_dist.config.schema import ActConfig
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.evaluate.depth_page import depth_page
from mythos_dist.evaluate.depth_text import TextDepths, measure_text, token_texts
from mythos_dist.model import Mythos

TEXT = 'Über <b>1 & 2</b>\n"</script><script>alert(1)</script>" 🙂 end'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(params=["off", "safe", "ponder"])
def model(request, config):
    """With drawn weights, large enough that loops make a difference."""
    torch.manual_seed(0)
    shape = dataclasses.replace(config.model, vocab_size=260, max_seq_len=128)
    model = Mythos(shape, act=ActConfig(mode=request.param), experts=config.experts).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5 if parameter.dim() > 1 else 1
    return model


def test_a_pass_reads_out_each_loop_as_if_it_were_the_last(model, tokenizer):
    """Against separate passes with 1 to 4 loops and torch's softmax and KL divergence."""
    depths = measure_text(model, tokenizer, TEXT, 4)
    ids = torch.tensor([tokenizer.encode(TEXT).tolist()])
    before = None
    for t in range(4):
        with torch.no_grad():
            logits = model(ids, t + 1)[0]
        probabilities = logits.softmax(-1)
        if type(model.recurrent.act).__name__ == "PonderHalting" and t > 0:
            continue  # there a token's output is the state of the loop at which it halts, not of the last
        shown = probabilities.gather(1, depths.top_tokens[t])
        torch.testing.assert_close(depths.top_probabilities[t], shown, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shown, probabilities.topk(3).values, atol=1e-5, rtol=1e-4)
        if before is not None:
            kl = torch.nn.functional.kl_div(before.log_softmax(-1), logits.softmax(-1), reduction="none").sum(-1)
            torch.testing.assert_close(depths.measures["kl"][t], kl, atol=1e-5, rtol=1e-3)
        before = logits
    assert ("halting" in depths.measures) == (type(model.recurrent.act).__name__ != "NoHalting")


def test_exits_follow_their_criterion():
    """Three loops, four tokens: met after the first loop that may stop, later, never, and with a value that is not a
    number."""
    measure = torch.tensor([[math.inf] * 4, [0.1, 0.9, 0.9, math.nan], [0.1, 0.1, 0.9, 0.9]])
    halting = torch.tensor([[0.5, 0.1, 0.0, 0.0], [0.9, 0.2, 0.1, 0.0], [1.0, 1.0, 1.0, 1.0]])
    top = torch.zeros(3, 4, 3, dtype=torch.int64)
    top[0, 0], top[1, :2, 0] = 7, torch.tensor([0, 5])
    depths = TextDepths(list("abcd"), {"kl": measure, "halting": halting}, top, top.float(), {}, 0)
    assert depths.exits("kl", 0.5) == [2, 3, 3, 3]
    assert depths.exits("halting", 0.5) == [1, 3, 3, 3]
    assert depths.agreement == [0.75, 0.75, 1.0]


def test_pieces_of_tokens_join_to_the_text(tokenizer):
    """Also characters of several bytes, each of which is a token."""
    tokens = tokenizer.encode(TEXT).tolist()
    pieces = token_texts(tokenizer, tokens)
    assert "".join(pieces) == TEXT and len(pieces) == len(tokens) > len(TEXT)


class Page(HTMLParser):
    """Tags with attributes, the visible text of the text's tokens, and the content of scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.tokens, self.scripts, self._inside = [], [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        self._inside = self.tags[-1]
        if tag == "span" and "data-i" in dict(attrs):
            self.tokens.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside and self._inside[0] == "script":
            self.scripts[-1] += data
        elif self._inside and "data-i" in self._inside[1]:
            self.tokens[-1] += data


def test_the_page_escapes_its_text_and_loads_nothing(tokenizer):
    """A text and a vocabulary that contain markup; the page has its own two scripts, and no address."""
    count = len(tokenizer.encode(TEXT))
    top = torch.tensor([[[60, 47, 33]] * count] * 3)  # "<", "/", "!" and the like
    measure = torch.rand(3, count)
    depths = TextDepths(
        token_texts(tokenizer, tokenizer.encode(TEXT).tolist()), {"kl": measure}, top, top / 200, {"kl": 0.5}, 2
    )
    evil = SimpleNamespace(decode=lambda ids: "</script><img src=x onerror=alert(1)>")
    source = depth_page("<i>title</i>", depths, evil, "kl", 0.5)
    page = Page(source)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2 and not {"img", "i", "link"} & set(names) and names.count("b") == 1
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys() or "onerror" in attrs]
    assert not re.search(r"https?:|url\(|@import", source)
    assert "".join(page.tokens).replace("·", "").replace("↵", "") == TEXT
    classes = [attrs["class"] for tag, attrs in page.tags if tag == "span" and "data-i" in attrs]
    assert classes == [f"t d{loop}" for loop in depths.exits("kl", 0.5)]
    data = json.loads(page.scripts[0])
    assert data["tokens"] == top.tolist() and set(data["vocabulary"].values()) == {evil.decode([0])}
    assert "prefers-color-scheme:dark" in source and "2 tokens beyond the context left out" in source
