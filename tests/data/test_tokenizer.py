"""Text survives encoding exactly, and no text can spell EOS."""

import io

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_dist.data import tokenizer as tokenizer_module
from mythos_dist.data.corpus import read_documents
from mythos_dist.data.tokenizer import Tokenizer, train_tokenizer
from mythos_dist.errors import UserError

TRICKY = st.lists(
    st.sampled_from(["</s>", "<s>", "<unk>", "<0x0A>", "\u2581", " ", "  ", "\n", "\r\n", "\t", "a", "日"])
)
TEXTS = st.text() | TRICKY.map("".join)
SENTENCES = [f"the {animal} number {n} sat on the mat" for n in range(200) for animal in ("cat", "dog", "rat")]


@settings(max_examples=300)
@given(text=TEXTS)
def test_decoding_gives_the_text_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXTS)
def test_eos_never_comes_out_of_text(tokenizer, text):
    assert tokenizer.eos_id not in tokenizer.encode(text + "</s>" + text)


def test_ids_are_int32_within_the_vocabulary_and_batches_agree(tokenizer, corpus):
    texts = [*list(read_documents(corpus))[:5], "", "a\u2581b"]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert 0 <= ids.min(initial=0) <= ids.max(initial=0) < tokenizer.vocab_size == 1000
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_a_lone_surrogate_does_not_end_a_conversion(tokenizer):
    assert tokenizer.decode(tokenizer.encode("bad \ud800 text")) == "bad ? text"


def test_training_again_gives_the_same_bytes_and_is_quiet(tmp_path, capfd):
    first = train_tokenizer(SENTENCES, tmp_path / "a.model", 300)
    second = train_tokenizer(SENTENCES, tmp_path / "b.model", 300)
    other = train_tokenizer([line.upper() for line in SENTENCES], tmp_path / "c.model", 300)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.sha256 == second.sha256 != other.sha256
    assert capfd.readouterr() == ("", "")


def test_a_large_corpus_is_sampled_by_seed(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "MAX_TRAIN_LINES", 50)
    samples = [tokenizer_module._sample_lines(SENTENCES, seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert len(set(samples[0])) == 50
    assert set(samples[0]) <= set(SENTENCES)
    assert not set(samples[0]) <= set(SENTENCES[:300])


def test_an_impossible_vocabulary_is_refused_with_a_possible_one(tmp_path):
    with pytest.raises(
        UserError, match=r"vocab_size=9000 is too large for this text; set it to at most (\d+)"
    ) as error:
        train_tokenizer(SENTENCES, tmp_path / "t.model", 9000)
    possible = int(str(error.value).split("at most ")[1].split(",")[0])
    assert train_tokenizer(SENTENCES, tmp_path / "t.model", possible).vocab_size == possible
    with pytest.raises(UserError, match="vocab_size=100 is too small"):
        train_tokenizer(SENTENCES, tmp_path / "u.model", 100)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], tmp_path / "u.model", 300)
    assert not (tmp_path / "u.model").exists()


def foreign_model(vocab_size=45, **options):
    """A model trained without our rules."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=vocab_size, minloglevel=2, **options
    )
    return model.getvalue()


def test_a_file_that_cannot_mark_the_end_of_documents_is_refused(tmp_path):
    cases = {
        "garbage.model": (b"garbage" * 50, "not a SentencePiece model"),
        "empty.model": (b"", "not a SentencePiece model"),
        "no_eos.model": (foreign_model(eos_id=-1), "no EOS control piece"),
        "typed_eos.model": (foreign_model(user_defined_symbols=["</s>"]), "no EOS control piece"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            Tokenizer.load(tmp_path / name)
    with pytest.raises(UserError, match=r"absent.model: no such file; train a tokenizer"):
        Tokenizer.load(tmp_path / "absent.model")


@pytest.mark.parametrize("options", [{"byte_fallback": True, "vocab_size": 300}, {"add_dummy_prefix": False}])
def test_a_models_own_rules_are_kept(tmp_path, options):
    """With a dummy prefix or without bytes, U+2581 is left to SentencePiece: cutting there would add prefixes."""
    (tmp_path / "foreign.model").write_bytes(foreign_model(**options))
    plain = spm.SentencePieceProcessor(model_file=str(tmp_path / "foreign.model"))
    text = "the cat\u2581sat on the rat"
    assert Tokenizer.load(tmp_path / "foreign.model").encode(text).tolist() == plain.encode(text)
