"""Text from tokens that arrive one by one."""

import random

import pytest

from experiments.chat_task import write_byte_tokenizer
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.generate.text import TextStream

TEXT = "naïve 東京 🙂 end. Next"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One token per byte."""
    return Tokenizer.load(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def texts_of(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    """The text after each token, up to a stop string."""
    stream, texts = TextStream(tokenizer.decode, (), stop), []
    for token in tokenizer.encode(text).tolist():
        stream.add(token)
        texts.append(stream.text)
        if stream.stopped:
            break
    return texts, stream


def test_text_grows_by_whole_characters(tokenizer):
    texts, _ = texts_of(tokenizer, TEXT)
    assert texts[-1] == TEXT and len(texts) == len(TEXT.encode())
    for i, text in enumerate(texts, 1):
        assert text == TEXT.encode()[:i].decode(errors="ignore")


@pytest.mark.parametrize("stop", [("京 ",), ("end. N", "Next"), ("xyz", "🙂"), ("naïve",)])
def test_stop_strings_end_the_text_across_tokens(stop, tokenizer):
    """No text is shown that is taken back: each is a beginning of the last. The stop string is left out."""
    texts, stream = texts_of(tokenizer, TEXT, stop)
    end = min(TEXT.index(one) for one in stop if one in TEXT)
    assert stream.stopped and texts[-1] == stream.full_text == TEXT[:end]
    assert all(TEXT[:end].startswith(text) for text in texts)


def test_the_beginning_of_a_stop_string_is_kept_back_until_it_is_none(tokenizer):
    texts, stream = texts_of(tokenizer, "a ST", ("STOP",))
    assert texts == ["a", "a ", "a ", "a "] and stream.full_text == "a ST" and not stream.stopped
    assert texts_of(tokenizer, "a STx", ("STOP",))[0][-1] == "a STx"


def test_random_stops_equal_a_search_in_the_full_text(tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices("abé", k=20))
        stop = tuple("".join(draw.choices("abé", k=draw.randint(1, 4))) for _ in range(2))
        _, stream = texts_of(tokenizer, text, stop)
        # The end of the first occurrence to be complete decides: tokens after it are never generated.
        complete = min((text.index(one) + len(one) for one in stop if one in text), default=None)
        shown = text[:complete]
        starts = [shown.index(one) for one in stop if one in shown]
        assert stream.full_text == (text if complete is None else shown[: min(starts)])


def test_the_prompts_last_token_keeps_the_first_space(shards_tokenizer):
    """SentencePiece drops the space of the first token that it decodes."""
    ids = shards_tokenizer.encode("one two three").tolist()
    stream = TextStream(shards_tokenizer.decode, ids[:4])
    for token in ids[4:]:
        stream.add(token)
    assert shards_tokenizer.decode(ids[:4]) + stream.full_text == "one two three"


@pytest.fixture(scope="module")
def shards_tokenizer(tmp_path_factory) -> Tokenizer:
    from mythos_dist.prepare.tokenizer_training import train_tokenizer

    texts = [f"{a} {b} {c}" for a in ("one", "two", "three") for b in ("two", "four") for c in ("three", "six")]
    return train_tokenizer(texts, tmp_path_factory.mktemp("spm") / "tokenizer.model", vocab_size=275)
