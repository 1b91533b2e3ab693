"""With the word cache, any text has the tokens of the tokenizer without it, and so has any split text."""

import io
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece as spm
import tokenizers
from helpers.selection import examples, first_is_quick
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from mythos_dist.data import tokenizer as tokenizer_module
from mythos_dist.data import word_cache
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.data.word_cache import parse_sentencepiece

TOPICS = list(topics.values())
SPACE = "\u2581"
TRAINING = [*TOPICS[:60], *["naïve café 3٣ x\u0301y 3² 日a本"] * 100]  # merges ASCII with other characters
SPELLED = """</s> <s> <unk> <0x0A> <|endoftext|> the The def naïve café 3٣ x\u0301y 3² return's
    DON'T we'll 'v x=y[0]; 12345 3rd ... -- (a b ' " .
    日本 本 é e\u0301 \u0301 🙂 👩\u200d👧 Привет \u017f ٣ \0 \x01 \ufeff
    long_words_are_not_kept_in_the_cache_but_encoded_whenever_they_are_met_as_a_part_of_a_text""".split()
WHITE = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\u00a0", "\u2003", "\u3000"]
TEXTS = st.lists(st.sampled_from([*SPELLED, *WHITE, *WHITE, SPACE])).map("".join) | st.text()
WORDS = st.lists(st.text(max_size=3) | st.sampled_from(SPELLED), min_size=40)
OURS = dict(
    model_type="bpe",
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    byte_fallback=True,
)
LLAMA3 = word_cache.CL100K_REGEX


def sentencepiece_model(vocab_size=1000, **options) -> bytes:
    """Trained on the help texts, with `options` in place of ours."""
    model = io.BytesIO()
    lines = (line for text in TRAINING for line in text.split("\n"))
    options = {**OURS, **options}
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, minloglevel=2, **options
    )
    return model.getvalue()


def with_pieces(model: bytes, *pieces: str, unused: str = "") -> bytes:
    """The model with additional pieces of the lowest scores, and with `unused` marked as unused."""
    proto = parse_sentencepiece(model)
    for piece in proto.pieces:
        if piece.piece == unused:
            piece.type = piece.UNUSED
    lowest = min(piece.score for piece in proto.pieces)
    for i, piece in enumerate(pieces):
        proto.pieces.add(piece=piece, score=lowest - 1 - i)
    return proto.SerializeToString()


def huggingface_model(pre_tokenizer, normalizer=None, added=(), **options) -> bytes:
    """Byte-level BPE trained on the help texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer.to_str().encode()


def split(regex, **level):
    """The pre-tokenizer of Llama 3 and others."""
    by_regex = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence(
        [by_regex, pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False, **level})]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CACHED = {
    "ours": sentencepiece_model,
    "dummy prefix": lambda: sentencepiece_model(add_dummy_prefix=True),
    "pieces over words": lambda: sentencepiece_model(split_by_whitespace=False),
    "pieces over lines": lambda: with_pieces(sentencepiece_model(), "e\n", "e\nt", "\n\n", "🙂🙂"),
    "GPT-2": lambda: huggingface_model(GPT2),
    "Llama 3": lambda: huggingface_model(split(LLAMA3), ignore_merges=True),
    "Qwen 2": lambda: huggingface_model(split(LLAMA3.replace("{1,3}", ""))),
}
NOT_CACHED = {
    "unigram": lambda: sentencepiece_model(model_type="unigram"),
    "normalizer": lambda: sentencepiece_model(normalization_rule_name="nmt_nfkc"),
    "white space removed": lambda: sentencepiece_model(remove_extra_whitespaces=True),
    "white space last": lambda: sentencepiece_model(treat_whitespace_as_suffix=True),
    "no bytes": lambda: sentencepiece_model(byte_fallback=False),
    "piece of the user": lambda: sentencepiece_model(user_defined_symbols=["in the"]),
    "unused piece": lambda: with_pieces(sentencepiece_model(), unused=f"{SPACE}the"),
    "HF: prefix": lambda: huggingface_model(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "HF: other split": lambda: huggingface_model(split(LLAMA3.replace("'ll|", ""))),
    "HF: normalizer": lambda: huggingface_model(GPT2, normalizers.NFC()),
    "HF: added token": lambda: huggingface_model(GPT2, added=["in the"]),
    "HF: added word": lambda: huggingface_model(GPT2, added=[AddedToken("return", single_word=True, lstrip=True)]),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Name of a kind -> (tokenizer, the library's own encode function)."""
    loaded = {}
    folder = tmp_path_factory.mktemp("models")

    def load(kind):
        if kind not in loaded:
            content = {**CACHED, **NOT_CACHED}[kind]()
            path = folder / kind.replace(":", "")
            path.write_bytes(content)
            loaded[kind] = Tokenizer.load(path), library_encode(content)
        return loaded[kind]

    return load


def library_encode(content: bytes):
    """text -> ids by the library alone, except for U+2581, which models that keep text encode as bytes."""
    if content.startswith(b"{"):
        huggingface = tokenizers.Tokenizer.from_str(content.decode())
        huggingface.encode_special_tokens = True
        return lambda text: huggingface.encode(text, add_special_tokens=False).ids
    model, proto = spm.SentencePieceProcessor(model_proto=content), parse_sentencepiece(content)
    normalizer = proto.normalizer_spec
    changes_text = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.name != "identity"
    if changes_text or not proto.trainer_spec.byte_fallback:
        return model.encode

    def encode(text):
        first, *rest = map(model.encode, text.split(SPACE))
        symbol = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return first + [i for part in rest for i in symbol + part]

    return encode


def check(tokenizer, encode, texts):
    """Assert that one call for all `texts` gives the tokens of `encode` for each."""
    documents = [text.encode() for text in texts]
    data = np.frombuffer(b"".join(documents), dtype=np.uint8)
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    tokens, counts = tokenizer.encode_documents(data, ends)
    assert tokens.dtype == np.int32 and counts.dtype == np.int64 and counts.shape == ends.shape
    expected = [encode(text) for text in texts]
    assert counts.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [i for ids in expected for i in ids]


@pytest.mark.parametrize("kind", first_is_quick(CACHED))
@settings(max_examples=examples(80))
@given(texts=st.lists(TEXTS, max_size=5))
def test_cached_tokens_equal_the_librarys(load, kind, texts):
    tokenizer, encode = load(kind)
    assert tokenizer.cached
    check(tokenizer, encode, texts)


@pytest.mark.parametrize("kind", first_is_quick(CACHED))
def test_real_text_has_the_librarys_tokens_with_an_empty_and_a_filled_cache(load, kind):
    tokenizer, encode = load(kind)
    check(tokenizer, encode, TOPICS[:40])
    check(tokenizer, encode, TOPICS[20:60] + [text.replace(" ", "  ") for text in TOPICS[:3]])


@pytest.mark.parametrize("kind", first_is_quick(NOT_CACHED))
def test_a_model_that_merges_across_words_is_not_cached(load, kind):
    tokenizer, encode = load(kind)
    assert not tokenizer.cached
    check(tokenizer, encode, [*TOPICS[:5], "", " in  the\nreturn 日本🙂 🙂\t", "in the", SPACE + "a"])


@pytest.mark.parametrize("bounds", [(0, 10**9, 64), (50, 10**9, 5), (10**9, 300, 64), (10**9, 10**9, 0)])
def test_clearing_the_cache_does_not_change_the_tokens(tmp_path, monkeypatch, bounds):
    for name, bound in zip(("MAX_WORDS", "MAX_TOKENS", "MAX_WORD_BYTES"), bounds, strict=True):
        monkeypatch.setattr(word_cache, name, bound)
    (tmp_path / "m").write_bytes(content := sentencepiece_model(600))
    tokenizer = Tokenizer.load(tmp_path / "m")
    for start in range(0, 20, 4):
        check(tokenizer, library_encode(content), TOPICS[start : start + 8])


@pytest.mark.parametrize("kind", ["ours", "GPT-2"])
def test_a_short_word_is_encoded_once(load, kind, monkeypatch):
    tokenizer, encode = load(kind)
    check(tokenizer, encode, ["one two three " * 3])
    monkeypatch.setattr(tokenizer._words, "_encode_words", lambda words: pytest.fail(f"{words} again"))
    check(tokenizer, encode, ["one two three " * 3, " two three"])


def test_the_cache_size_is_bounded(load, monkeypatch):
    """By the limits plus one batch."""
    monkeypatch.setattr(word_cache, "MAX_WORDS", 200)
    tokenizer, encode = load("ours")
    check(tokenizer, encode, TOPICS[:2])
    check(tokenizer, encode, ["one two"])
    assert len(tokenizer._words._slot_of) <= 10


def test_a_wrong_cache_is_detected_on_load_and_turned_off(tmp_path, monkeypatch):
    """With a boundary between any two characters, the probe must fail."""
    every = ~np.repeat(np.arange(256) & 0xC0 == 0x80, 256)
    monkeypatch.setattr(tokenizer_module, "sentencepiece_boundaries", lambda proto: every)
    (tmp_path / "m").write_bytes(content := sentencepiece_model())
    tokenizer = Tokenizer.load(tmp_path / "m")
    assert not tokenizer.cached
    check(tokenizer, library_encode(content), TOPICS[:2])


@pytest.mark.parametrize("kind", [kind for kind in CACHED if kind != "pieces over words"])
@settings(max_examples=examples(30))
@given(
    words=st.lists(st.text(max_size=3) | st.sampled_from(SPELLED), min_size=20), other=TEXTS, limit=st.integers(30, 60)
)
def test_a_document_split_at_spaces_has_the_tokens_of_the_full_text(load, kind, words, other, limit):
    """Another document follows the last part in its batch."""
    tokenizer, encode = load(kind)
    text = " ".join(words)
    rest, tokens, continues = np.frombuffer(text.encode(), np.uint8), [], False
    while len(rest) > limit:
        end = tokenizer.split_point(rest, limit)
        assume(rest[end] == ord(" ") and 32 < rest[end - 1] < 127)
        tokens += tokenizer.encode_documents(rest[:end], np.array([end]), continues)[0].tolist()
        rest, continues = rest[end:], True
    data = np.concatenate([rest, np.frombuffer(other.encode(), np.uint8)])
    continued, counts = tokenizer.encode_documents(data, np.array([len(rest), len(data)]), continues)
    assert tokens + continued[: counts[0]].tolist() == encode(text)
    assert continued[counts[0] :].tolist() == encode(other)
