"""Decoding restores text exactly, no text encodes to EOS, and ids are those of the tokenizer's own library."""

import io
import json
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece as spm
import tokenizers
from helpers.selection import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.prepare import tokenizer_training
from mythos_dist.prepare.tokenizer_training import sample_lines, train_tokenizer

TRICKY = st.lists(
    st.sampled_from(["</s>", "<s>", "<unk>", "<0x0A>", "\u2581", " ", "  ", "\n", "\r\n", "\t", "a", "日"])
)
TEXTS = st.text() | TRICKY.map("".join)
TOPICS = list(topics.values())
SENTENCES = [f"the {animal} number {n} sat on the mat" for n in range(200) for animal in ("cat", "dog", "rat")]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(tmp_path_factory, request):
    """Trained as users train it."""
    return train_tokenizer(TOPICS[:40], tmp_path_factory.mktemp("model") / "m.model", 1000, request.param)


def encode_documents(tokenizer, texts, continues=False) -> list[list[int]]:
    """Concatenated documents, as the converter passes them."""
    documents = [text.encode() for text in texts]
    data = np.frombuffer(b"".join(documents), dtype=np.uint8)
    tokens, counts = tokenizer.encode_documents(
        data, np.cumsum([len(one) for one in documents], dtype=np.int64), continues
    )
    assert tokens.dtype == np.int32 and counts.dtype == np.int64 and len(counts) == len(texts)
    assert counts.sum() == len(tokens)
    return [ids.tolist() for ids in np.split(tokens, np.cumsum(counts)[:-1])]


def encode_in_parts(tokenizer, text, limit) -> list[int]:
    """One document split into parts of at most `limit` bytes."""
    rest, ids, continues = np.frombuffer(text.encode(), dtype=np.uint8), [], False
    while len(rest) > limit:
        end = tokenizer.split_point(rest, limit)
        ids += encode_documents(tokenizer, [rest[:end].tobytes().decode()], continues)[0]
        rest, continues = rest[end:], True
    return ids + encode_documents(tokenizer, [rest.tobytes().decode()], continues)[0]


@settings(max_examples=examples(200))
@given(text=TEXTS)
def test_decoding_restores_the_text_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXTS)
def test_text_never_encodes_to_eos(tokenizer, text):
    assert tokenizer.eos_id not in tokenizer.encode(text + "</s>" + text)


def test_documents_of_a_batch_are_encoded_separately(tokenizer):
    texts = [*TOPICS[:5], "", "a\u2581b", " ", "", "日本"]
    assert encode_documents(tokenizer, []) == [[]]
    for text, ids in zip(texts, encode_documents(tokenizer, texts), strict=True):
        assert ids == tokenizer.encode(text).tolist()
        assert all(0 <= i < tokenizer.vocab_size == 1000 for i in ids)
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_a_lone_surrogate_becomes_a_question_mark(tokenizer):
    assert tokenizer.decode(tokenizer.encode("bad \ud800 text")) == "bad ? text"


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_is_reproducible_and_prints_nothing(tmp_path, capfd, model_type):
    first = train_tokenizer(SENTENCES, tmp_path / "a.model", 300, model_type)
    second = train_tokenizer(iter(SENTENCES), tmp_path / "b.model", 300, model_type)
    other = train_tokenizer([line.upper() for line in SENTENCES], tmp_path / "c.model", 300, model_type)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.sha256 == second.sha256 != other.sha256
    assert capfd.readouterr() == ("", "")


def test_a_large_corpus_is_sampled_with_the_seed(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "MAX_TRAIN_LINES", 50)
    samples = [sample_lines(SENTENCES, seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert len(set(samples[0])) == 50
    assert set(samples[0]) <= set(SENTENCES)
    assert not set(samples[0]) <= set(SENTENCES[:300])


def test_an_impossible_vocab_size_is_refused_with_a_possible_one(tmp_path):
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


def foreign_model(vocab_size=45, **options) -> bytes:
    """A model trained with other options than ours."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=vocab_size, minloglevel=2, **options
    )
    return model.getvalue()


def test_a_file_that_is_no_tokenizer_or_has_no_eos_is_refused(tmp_path):
    cases = {
        "garbage.model": (b"garbage" * 50, "not a SentencePiece model"),
        "empty.model": (b"", "not a SentencePiece model"),
        "no_eos.model": (foreign_model(eos_id=-1), "no EOS control piece"),
        "typed_eos.model": (foreign_model(user_defined_symbols=["</s>"]), "no EOS control piece"),
        "garbage.json": (b"{}", "not a tokenizer.json that can be read"),
        "text.json": (b"\xff\xfe", "not a tokenizer.json that can be read"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            Tokenizer.load(tmp_path / name)
    with pytest.raises(UserError, match=r"absent.model: no such file; train a tokenizer"):
        Tokenizer.load(tmp_path / "absent.model")


@pytest.mark.parametrize("options", [{"byte_fallback": True, "vocab_size": 300}, {"add_dummy_prefix": False}])
def test_a_models_own_white_space_rules_are_kept(tmp_path, options):
    """With a dummy prefix or without byte fallback, U+2581 is left to SentencePiece: splitting there adds prefixes."""
    (tmp_path / "foreign.model").write_bytes(foreign_model(**options))
    plain = spm.SentencePieceProcessor(model_file=str(tmp_path / "foreign.model"))
    text = "the cat\u2581sat on the rat"
    assert Tokenizer.load(tmp_path / "foreign.model").encode(text).tolist() == plain.encode(text)


def test_eos_can_be_another_control_piece(tmp_path):
    path = tmp_path / "m.model"
    path.write_bytes(foreign_model(control_symbols=["<end>"], eos_id=-1))
    tokenizer = Tokenizer.load(path, eos="<end>")
    assert (tokenizer.eos, tokenizer.eos_id) == ("<end>", 2)
    for name in ("cat", "<unk>", "absent"):
        with pytest.raises(UserError, match=f"no '{name}' control piece"):
            Tokenizer.load(path, eos=name)


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("one two three", 8, 7),
        ("one two three", 7, 7),
        ("one two three", 6, 3),
        ("one  two", 5, 3),  # consecutive spaces stay with the second part
        ("one\n two", 5, 3 + 1),  # no visible ASCII before the space
        (" onetwo", 4, 4),
        ("éééé éé", 5, 4),  # no space: between characters
        ("éééé éé", 9, 8),
        ("a🙂🙂", 8, 5),
        ("日本 a b日本日本", 9, 8),
    ],
)
def test_a_document_is_split_before_a_space_or_else_between_characters(tokenizer, text, limit, expected):
    assert tokenizer.split_point(np.frombuffer(text.encode(), dtype=np.uint8), limit) == expected


@given(text=TEXTS, limit=st.integers(4, 40))
def test_a_split_point_is_within_the_limit_and_between_characters(tokenizer, text, limit):
    data = (text + " " + "日" * limit).encode()
    position = tokenizer.split_point(np.frombuffer(data, dtype=np.uint8), limit)
    assert 0 < position <= limit
    data[:position].decode()


def test_split_documents_encode_to_the_tokens_of_the_full_text(tokenizer):
    """Unigram models sum scores from the start of a text in float32: when a run of one character can be divided in
    several ways, rounding decides. That is about 1 token in 3,000 of these texts."""
    for text in TOPICS[:30]:
        ids, expected = np.array(encode_in_parts(tokenizer, text, 300)), tokenizer.encode(text)
        assert len(ids) == len(expected)
        assert (ids != expected).mean() <= (0 if tokenizer.cached else 0.01)
        assert tokenizer.decode(ids) == text


@settings(max_examples=examples(100))
@given(text=TEXTS, limit=st.integers(4, 40))
def test_split_text_decodes_exactly(tokenizer, text, limit):
    assert tokenizer.decode(encode_in_parts(tokenizer, text, limit)) == text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True},
        {"byte_fallback": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
        {"byte_fallback": True, "treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False},
    ],
)
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_dummy_prefix_is_not_repeated_inside_a_document(tmp_path, options, model_type):
    """Also when a text without spaces is split. SentencePiece's defaults, byte fallback, and Llama 2's options."""
    (tmp_path / "m.model").write_bytes(foreign_model(300, model_type=model_type, hard_vocab_limit=False, **options))
    tokenizer = Tokenizer.load(tmp_path / "m.model")
    for text in (" ".join(SENTENCES[:50]), "the cat  sat  on the rat", " the cat sat on"):
        assert encode_in_parts(tokenizer, text, 16) == tokenizer.encode(text).tolist()
    text = "thecatsatonthematthecatsatonthemat"
    if not options.get("treat_whitespace_as_suffix"):
        assert tokenizer.decode(encode_in_parts(tokenizer, text, 8)) == text


def byte_level(special=("<|endoftext|>",), prefix=False) -> tokenizers.Tokenizer:
    """A tokenizer like GPT-2's, trained on sentences."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def llama_2(vocab) -> tokenizers.Tokenizer:
    """A tokenizer like Llama 2's: a prefix from the normalizer, byte fallback."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def save(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_tokenizer_json_gives_the_ids_of_its_library(tmp_path):
    plain = byte_level()
    tokenizer = Tokenizer.load(save(plain, tmp_path))
    assert tokenizer.file_name == "tokenizer.json" and tokenizer.cached
    assert tokenizer.vocab_size == 400 and tokenizer.eos_id == plain.token_to_id("<|endoftext|>")
    texts = ["the cat", "", " naïve  日本\n"]
    assert encode_documents(tokenizer, texts) == [plain.encode(text).ids for text in texts]
    assert tokenizer.encode("the cat").dtype == np.int32
    assert tokenizer.decode(tokenizer.encode("bad \ud800 text")) == "bad ? text"
    assert tokenizer.decode([tokenizer.eos_id]) == ""


@given(text=TEXTS)
def test_no_text_encodes_to_a_special_token(json_tokenizer, text):
    text = text + "<|endoftext|>" + text
    assert json_tokenizer.eos_id not in json_tokenizer.encode(text)
    assert json_tokenizer.eos_id not in encode_documents(json_tokenizer, [text, "<|endoftext|>"])[0]
    assert json_tokenizer.decode(json_tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def json_tokenizer(tmp_path_factory):
    return Tokenizer.load(save(byte_level(), tmp_path_factory.mktemp("json")))


def test_padding_truncation_and_post_processing_in_the_file_are_ignored(tmp_path):
    """Truncation to 5 tokens would silently drop the rest of each text."""
    plain = byte_level(["<|endoftext|>", "<s>"])
    text = "the cat sat on the mat " * 10
    ids = plain.encode(text).ids
    plain.enable_truncation(5)
    plain.enable_padding(length=300)
    plain.post_processor = processors.TemplateProcessing("<s> $A <s>", special_tokens=[("<s>", 1)])
    assert len(plain.encode(text).ids) == 300
    tokenizer = Tokenizer.load(save(plain, tmp_path))
    assert tokenizer.encode(text).tolist() == ids == encode_documents(tokenizer, [text])[0]


def test_eos_is_found_in_the_file_or_must_be_given(tmp_path):
    path = save(byte_level(["<s>", "</s>", "<|endoftext|>", "<|im_end|>"]), tmp_path)
    with pytest.raises(UserError, match=r"does not name its EOS .* pass --eos with one of: <s> </s> <\|endoftext"):
        Tokenizer.load(path)
    with pytest.raises(UserError, match="'the' is not a special token of this file; pass --eos with one of: <s> </s>"):
        Tokenizer.load(path, eos="the")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    assert Tokenizer.load(path).eos == "</s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert Tokenizer.load(path).eos == "<|im_end|>"
    assert Tokenizer.load(path, eos="<|endoftext|>").eos_id == 2
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not valid JSON"):
        Tokenizer.load(path)


def test_a_file_whose_special_tokens_are_words_is_refused(tmp_path):
    """A WordLevel model looks up words: the word "</s>" is the token "</s>"."""
    plain = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "the": 1, "<unk>": 2}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens(["</s>"])
    with pytest.raises(UserError, match="the text '</s>' encodes to EOS"):
        Tokenizer.load(save(plain, tmp_path))


def test_vocab_size_is_the_largest_id_plus_one(tmp_path):
    plain = tokenizers.Tokenizer(models.WordLevel({"the": 1, "cat": 70_000, "<unk>": 2}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.add_special_tokens(["</s>"])
    tokenizer = Tokenizer.load(save(plain, tmp_path))
    assert tokenizer.vocab_size == max(70_000, tokenizer.eos_id) + 1
    assert tokenizer.encode("the cat").tolist() == [1, 70_000]


@pytest.mark.parametrize("kind", ["byte level", "byte level with prefix", "Llama 2"])
def test_a_split_document_has_the_ids_of_the_full_text(tmp_path, kind):
    letters = {letter: i + 257 for i, letter in enumerate("\u2581 abcdehmnorstu0123456789")}
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, **letters}
    plain = llama_2(vocab) if kind == "Llama 2" else byte_level(prefix="prefix" in kind)
    tokenizer = Tokenizer.load(save(plain, tmp_path))
    for text in (" ".join(SENTENCES[:30]), "the cat  sat  on the rat", " the cat sat on é"):
        assert encode_in_parts(tokenizer, text, 16) == plain.encode(text).ids


@pytest.mark.parametrize("is_json", [False, True])
def test_a_forked_process_can_encode(tmp_path, is_json):
    """With a thread pool in the parent, the child would deadlock: threads do not survive a fork."""
    if is_json:
        tokenizer = Tokenizer.load(save(byte_level(), tmp_path))
    else:
        tokenizer = train_tokenizer(SENTENCES, tmp_path / "m.model", 300, "bpe")
    expected = encode_documents(tokenizer, SENTENCES[:50])
    context = multiprocessing.get_context("fork")
    encoded = context.SimpleQueue()
    child = context.Process(target=lambda: encoded.put(encode_documents(tokenizer, SENTENCES[:50])))
    child.start()
    child.join(240)
    assert child.exitcode == 0 and encoded.get() == expected


def run_tool(*arguments) -> subprocess.CompletedProcess:
    tool = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"
    return subprocess.run([sys.executable, tool, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.launch
def test_the_command_is_reproducible_and_reports_what_it_does(tmp_path):
    pq.write_table(pa.table({"text": SENTENCES}), tmp_path / "text.parquet")
    command = ("--input", tmp_path / "text.parquet", "--vocab-size", 300, "--model-type", "bpe", "--out")
    first = run_tool(*command, tmp_path / "a.model", "--json")
    assert first.returncode == 0, first.stderr
    assert re.search(r"training bpe of 300 pieces on 600 lines, 0.0 MB", first.stderr)
    result = json.loads(first.stdout)
    tokenizer = Tokenizer.load(tmp_path / "a.model")
    assert result == {
        "path": str(tmp_path / "a.model"),
        "vocab_size": 300,
        "sha256": tokenizer.sha256,
        "model_type": "bpe",
        "lines": 600,
        "text_bytes": sum(map(len, SENTENCES)),
    }
    second = run_tool(*command, tmp_path / "b.model", "--quiet")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert (tmp_path / "b.model").read_bytes() == (tmp_path / "a.model").read_bytes()
    wrong = run_tool(*command, tmp_path / "c.model", "--sample-mb", 0)
    assert wrong.returncode == 2 and "--sample-mb=0" in wrong.stderr and not (tmp_path / "c.model").exists()


# ---- Unknown characters


def json_file(model, folder, **parts):
    """A tokenizer.json of `model` with an EOS token."""
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens(["<eos>"])
    return save(tokenizer, folder)


LETTERS = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}


def test_a_tokenizer_that_drops_characters_is_refused_with_the_remedy(tmp_path):
    """With neither an unknown token nor byte fallback, the library drops such characters or raises."""
    with pytest.raises(UserError, match=r"loses characters: é ß .* train one with `mythos tokenizer`"):
        Tokenizer.load(json_file(models.BPE(LETTERS, []), tmp_path))
    latin = {**LETTERS, **{letter: 27 + i for i, letter in enumerate("éß語")}}
    with pytest.raises(UserError, match=r"loses characters: Ж "):
        Tokenizer.load(json_file(models.BPE(latin, []), tmp_path))
    scores = [(letter, -1.0) for letter in LETTERS]
    for model in (models.Unigram(scores), models.WordLevel(LETTERS)):
        with pytest.raises(UserError, match=r"cannot encode some texts .*; use another tokenizer"):
            Tokenizer.load(json_file(model, tmp_path))


def test_unknown_tokens_are_counted(tmp_path):
    from mythos_dist.prepare.convert import convert

    (tmp_path / "a.txt").write_text("some text with ÄÖ and 日本\n" * 20)
    unknown = {**LETTERS, "<unk>": 27}
    scores = [("<unk>", -10.0), *((letter, -1.0) for letter in LETTERS)]
    for i, model in enumerate((models.BPE(unknown, [], unk_token="<unk>"), models.Unigram(scores, unk_id=0))):
        tokenizer = Tokenizer.load(json_file(model, tmp_path))
        count = sum(tokenizer.encode("some text with ÄÖ and 日本\n") == tokenizer.unk_id)
        assert count >= 2
        manifest = convert(tmp_path / "a.txt", tokenizer, 8, tmp_path / f"{i}", heldout=0, quiet=True)
        assert manifest.unknown_tokens == tokenizer.encode("some text with ÄÖ and 日本\n" * 20).tolist().count(
            tokenizer.unk_id
        )
        assert "are <unk>: characters that the tokenizer cannot encode" in manifest.summary()


def test_tokenizers_with_byte_fallback_have_no_unknown_token(tokenizer, json_tokenizer):
    assert tokenizer.unk_id is None and json_tokenizer.unk_id is None


def test_a_sentencepiece_model_without_byte_fallback_has_an_unknown_token(tmp_path):
    (tmp_path / "a.model").write_bytes(foreign_model())
    tokenizer = Tokenizer.load(tmp_path / "a.model")
    assert tokenizer.unk_id in tokenizer.encode("日本")
