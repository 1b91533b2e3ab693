"""AutoTokenizer gives the ids of training from the files of an export, for texts on which converters differ."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.chat_task import write_byte_tokenizer
from mythos_dist.data.chat_template import PLAIN_TEMPLATE, find_renderer
from mythos_dist.data.manifest import ChatTemplate
from mythos_dist.data.tokenizer import PROBE, RARE, Tokenizer
from mythos_dist.data.tokenizer_files import ModelTokenizer, tokenizer_in, write_tokenizer
from mythos_dist.prepare.tokenizer_training import train_tokenizer

pytestmark = pytest.mark.launch  # transformers is 4 seconds of imports

HARD = [
    *("", " ", "   ", "       ", "\n\n\n", "\t\t x", "a" * 50, "-" * 77, "\r\n\r\n", "\x00\x01\x7f", PROBE, RARE),
    *("🙂🙂🙂👨‍👩‍👧‍👦", "日本語のテキスト", "é e\u0301", "ﬁ ligature", "\u00a0\u200b\ufeff", "1234567890" * 5),
    *("<0x41><0xE2>", "</x> <s", "x<y>z<<<>>>", "\u2581a\u2581\u2581b \u2581", "def f(x):\n    return x < 3\n"),
]
MESSAGES = [
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "why? 🙂"},
]


@pytest.fixture(scope="module", params=["unigram", "bpe", "bytes"])
def pair(request, tmp_path_factory) -> tuple[Tokenizer, object]:
    """Training's tokenizer, and the one that transformers loads from the files that an export has."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bytes":
        ours = Tokenizer.load(write_byte_tokenizer(folder))
    else:
        # A text that does not change: whether scores are equal depends on it.
        texts = (Path(__file__).parents[2] / "LICENSE").read_text().splitlines(keepends=True) + HARD
        ours = train_tokenizer(texts, folder / "some.model", 700, request.param)
    out = folder / "export"
    out.mkdir()
    template = ChatTemplate(PLAIN_TEMPLATE, {"eos_token": ours.eos})
    assert write_tokenizer(out, ModelTokenizer(ours, template), 128) == ""
    return ours, AutoTokenizer.from_pretrained(out)


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_texts_have_the_ids_of_training(pair, text):
    """And decode to themselves. In a run of one character the order of pieces may differ: see below."""
    ours, theirs = pair
    ids = theirs(text).input_ids
    if all(one != other for one, other in itertools.pairwise(text)):
        assert ids == ours.encode(text).tolist()
    assert sorted(ids) == sorted(ours.encode(text).tolist())
    assert theirs.decode(ids) == text


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"])) | st.text(" \n\t<>0xAF/s\u2581ab", max_size=40))
def test_any_text_decodes_to_itself_and_has_the_ids_of_training(pair, text):
    """Equal scores of a unigram model may be ordered differently, so ids are compared where no character repeats."""
    ours, theirs = pair
    ids = theirs(text, split_special_tokens=True).input_ids
    assert theirs.decode(ids) == text
    if all(one != other for one, other in itertools.pairwise(text)):
        assert ids == ours.encode(text).tolist()


def test_texts_of_special_tokens_are_those_tokens(pair):
    """As our encoder reads what a chat template renders; batches are padded on the left with EOS."""
    ours, theirs = pair
    text = f"a b{ours.eos}c d{ours.eos}\n"
    assert theirs(text).input_ids == ours.encode_rendered(text, False).tolist()
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.model_max_length) == (ours.eos_id, ours.eos_id, 128)
    batch = theirs(["a", "a b c d e f"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["input_ids"][0][-1] == ours.encode("a")[-1]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_the_chat_template_renders_the_prompts_of_training(pair):
    ours, theirs = pair
    expected = "".join(piece.text for piece in find_renderer(ours, "plain").prompt(MESSAGES))
    assert theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == expected


def test_an_export_gives_back_tokenizer_and_template(pair):
    ours, theirs = pair
    found = tokenizer_in(Path(theirs.name_or_path))
    assert found and found.template and found.template.text == PLAIN_TEMPLATE
    assert found.tokenizer.encode(PROBE).tolist() == ours.encode(PROBE).tolist() and found.tokenizer.eos == ours.eos


def test_a_post_processor_that_adds_tokens_is_left_out(tmp_path):
    """Training adds no BOS."""
    from transformers import AutoTokenizer

    file = write_byte_tokenizer(tmp_path)
    spec = json.loads(file.read_text())
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": spec["added_tokens"][0]["content"], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {
            spec["added_tokens"][0]["content"]: {
                "id": spec["added_tokens"][0]["content"],
                "ids": [spec["added_tokens"][0]["id"]],
                "tokens": [spec["added_tokens"][0]["content"]],
            }
        },
    }
    file.write_text(json.dumps(spec))
    out = tmp_path / "export"
    out.mkdir()
    ours = Tokenizer.load(file)
    write_tokenizer(out, ModelTokenizer(ours), 128)
    assert AutoTokenizer.from_pretrained(out)("ab").input_ids == ours.encode("ab").tolist()


def test_rules_that_cannot_be_converted_are_noted(tmp_path):
    """White space as suffix: the note says what AutoTokenizer will miss, and the model itself is in the export."""
    import sentencepiece as spm

    lines = "the cat and the dog and the bird sat on the mat\n" * 50
    (tmp_path / "text").write_text(lines)
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "suffix"),
        vocab_size=300,
        byte_fallback=True,
        treat_whitespace_as_suffix=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    out = tmp_path / "export"
    out.mkdir()
    note = write_tokenizer(out, ModelTokenizer(Tokenizer.load(tmp_path / "suffix.model")), 128)
    assert "AutoTokenizer finds no tokenizer" in note
    assert (out / "tokenizer.model").exists() and not (out / "tokenizer.json").exists()
