"""Conversations to shards: each once and undivided, with its mask, against plain loops over characters."""

import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from helpers.conversion import SPLITS, contents, read_windows
from hypothesis import given
from hypothesis import strategies as st

from experiments.chat_task import END, write_byte_tokenizer
from mythos_dist.data.chat_template import find_renderer
from mythos_dist.data.loss_mask import FIRST, IN_LOSS, PADDING
from mythos_dist.data.manifest import Filters, read_shard_manifest
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.prepare import convert as convert_module
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.mds import ShardWriter
from mythos_dist.prepare.packing import WindowPacker, split_conversations
from mythos_dist.prepare.spans import Columns
from mythos_dist.prepare.verify import verify

SEQ_LEN = 63
VOCAB_SIZE = 260


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def some_conversations(number, seed=1):
    """Of one to three turns, and lengths around the window's."""
    draw = random.Random(seed)

    def words():
        return "".join(draw.choices("abc xyz", k=draw.choice([1, 3, 8, 20, 70]))) + str(draw.random())[2:8]

    return [
        [turn for _ in range(draw.choice([1, 1, 2, 3])) for turn in (("user", words()), ("assistant", words()))]
        for _ in range(number)
    ]


def write_lines(file, conversations):
    def record(turns):
        if len(turns) == 2:
            return {"prompt": turns[0][1], "completion": turns[1][1]}
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    file.write_text("".join(json.dumps(record(turns)) + "\n" for turns in conversations))
    return file


def characters(turns, size=SEQ_LEN + 1):
    """The reference: (character or special token, in the loss) of a conversation in a window of `size`."""
    found = []
    for role, content in turns:
        in_loss = role == "assistant"
        found += [(f"<|{role}|>", False), *((sign, in_loss) for sign in content), (END, in_loss)]
    found = found[:size]
    while found and not found[-1][1]:
        found.pop()
    return tuple(found)


def written(folder, split, tokenizer):
    """The conversations in a split's windows, in the form of `characters`, and the number of padding tokens."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    found, padding = [], 0
    for window in read_windows(folder, split):
        tokens, flags = np.array(window).reshape(2, -1)
        assert flags[0] & FIRST
        padding += int(((flags & PADDING) > 0).sum())
        for conversation in split_conversations(np.stack([tokens, flags])):
            if conversation[1, 0] & PADDING:
                assert (conversation[0] == tokenizer.eos_id).all() and not (conversation[1] & IN_LOSS).any()
                continue
            text = [names.get(token) or tokenizer.decode([token]) for token in conversation[0].tolist()]
            found.append(tuple(zip(text, (conversation[1] & IN_LOSS).astype(bool).tolist(), strict=True)))
    return found, padding


def convert_chat(file, tokenizer, out, seq_len=SEQ_LEN, heldout=0.0, template=None, **options):
    columns = Columns(chat=find_renderer(tokenizer, template))
    return convert(file, tokenizer, seq_len, out, heldout=heldout, columns=columns, quiet=True, **options)


@pytest.mark.parametrize("heldout", [0.0, 0.2])
@pytest.mark.parametrize("small", ["", "parts", "batches"])
def test_each_conversation_is_in_one_window_with_its_mask(
    heldout, small, tokenizer, tmp_path, request, monkeypatch, tiny_pieces
):
    """Also in many parts, and with conversations that count as long documents."""
    if small == "parts":
        request.getfixturevalue("part_per_span")
        monkeypatch.setattr("mythos_dist.prepare.spans.TEXT_CHUNK_BYTES", 2000)
        monkeypatch.setattr("mythos_dist.prepare.packing.OPEN_WINDOWS", 3)
    if small == "batches":
        tiny_pieces(100)
    conversations = some_conversations(200)
    manifest = convert_chat(
        write_lines(tmp_path / "a.jsonl", conversations), tokenizer, tmp_path / "out", heldout=heldout
    )
    expected = [characters(turns) for turns in conversations]
    kept = [one for one in expected if one]
    found = {split: written(tmp_path / "out", split, tokenizer) for split in SPLITS}
    assert Counter(found["train"][0] + found["heldout"][0]) == Counter(kept)
    lengths = [sum(len(content) + 2 for _, content in turns) for turns in conversations]
    counts = manifest.documents
    assert (counts.read, counts.written, counts.not_learnt) == (200, len(kept), 200 - len(kept))
    assert (
        counts.not_learnt > 0
        and counts.truncated == sum(length > SEQ_LEN + 1 for length in lengths) - counts.not_learnt
    )
    for split, counted in manifest.splits.items():
        some, padding = found[split]
        assert (counted.documents, counted.padding) == (len(some), padding)
        assert counted.tokens == sum(map(len, some)) and counted.learnt == sum(
            in_loss for one in some for _, in_loss in one
        )
        assert counted.tokens + padding == counted.tokens_written == counted.windows * (SEQ_LEN + 1)
    assert bool(found["heldout"][0]) == bool(heldout)
    assert read_shard_manifest(tmp_path / "out") == manifest
    report = verify(tmp_path / "out")
    assert report.ok, (report.problems, report.bad)


def test_the_shards_are_the_same_bytes_at_any_number_of_workers_and_the_held_out_split_at_any_order(
    tokenizer, tmp_path, part_per_span, monkeypatch
):
    monkeypatch.setattr("mythos_dist.prepare.spans.TEXT_CHUNK_BYTES", 2000)
    conversations = some_conversations(150)
    lines = write_lines(tmp_path / "a.jsonl", conversations)
    convert_chat(lines, tokenizer, tmp_path / "one", heldout=0.2)
    convert_chat(lines, tokenizer, tmp_path / "two", heldout=0.2, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    convert_chat(write_lines(tmp_path / "b.jsonl", conversations[::-1]), tokenizer, tmp_path / "reversed", heldout=0.2)
    orders = [written(tmp_path / name, "heldout", tokenizer)[0] for name in ("one", "reversed")]
    assert Counter(orders[0]) == Counter(orders[1]) and len(orders[0]) > 5


def test_an_interrupted_conversion_resumes_to_the_same_bytes(tokenizer, tmp_path, part_per_span, monkeypatch):
    """Parts that were finished are not converted again."""
    monkeypatch.setattr("mythos_dist.prepare.spans.TEXT_CHUNK_BYTES", 2000)
    lines = write_lines(tmp_path / "a.jsonl", some_conversations(100))
    convert_chat(lines, tokenizer, tmp_path / "uninterrupted", heldout=0.2)
    convert_part, converted = convert_module.convert_part, []

    def stop_after_three(converter, job, part, *arguments):
        if len(converted) == 3:
            raise KeyboardInterrupt
        converted.append(part.index)
        return convert_part(converter, job, part, *arguments)

    monkeypatch.setattr(convert_module, "convert_part", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        convert_chat(lines, tokenizer, tmp_path / "out", heldout=0.2)
    converted.clear()
    monkeypatch.setattr(
        convert_module, "convert_part", lambda *task: converted.append(task[2].index) or convert_part(*task)
    )
    convert_chat(lines, tokenizer, tmp_path / "out", heldout=0.2)
    assert converted[0] == 3 and len(converted) > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def test_of_few_conversations_the_last_windows_are_held_out(tokenizer, tmp_path):
    conversations = some_conversations(12)
    lines = write_lines(tmp_path / "a.jsonl", conversations)
    manifest = convert_chat(lines, tokenizer, tmp_path / "out", heldout=0.02)
    assert manifest.heldout_by == "window" and manifest.splits["heldout"].windows == 1
    found = {split: written(tmp_path / "out", split, tokenizer)[0] for split in SPLITS}
    assert Counter(found["train"] + found["heldout"]) == Counter(filter(None, map(characters, conversations)))
    assert not set(found["train"]) & set(found["heldout"])
    assert manifest.splits["heldout"].documents == len(found["heldout"]) > 0
    assert verify(tmp_path / "out").ok


def test_filters_act_on_conversations(tokenizer, tmp_path):
    """Duplicates, tokens and the limit, which is exact: no EOS is added."""
    conversations = [one for one in some_conversations(60) if len(characters(one)) > 1]
    lines = write_lines(tmp_path / "a.jsonl", [*conversations, *conversations])
    filters = Filters(dedup=True, min_tokens=30, limit_tokens=1000)
    manifest = convert_chat(lines, tokenizer, tmp_path / "out", filters=filters)
    expected, total = [], 0
    for turns in conversations:
        if total < 1000 and sum(len(content) + 2 for _, content in turns) >= 30:
            expected.append(characters(turns))
            total += len(expected[-1])
    assert total >= 1000, "the limit has to be reached before the duplicates"
    assert Counter(written(tmp_path / "out", "train", tokenizer)[0]) == Counter(expected)
    again = convert_chat(lines, tokenizer, tmp_path / "all", filters=Filters(dedup=True))
    assert again.documents.duplicate == len(conversations) and manifest.documents.short > 0


@given(st.lists(st.integers(1, 20), max_size=60))
def test_no_window_could_take_the_conversations_of_another(lengths):
    """While fewer windows are open than may be: any two windows together have more tokens than fit into one."""
    rows = []

    class Rows(ShardWriter):
        def __init__(self):
            pass

        dtype = np.dtype("uint16")

        def add(self, tokens):
            rows.append(tokens.reshape(2, 20))

    packer = WindowPacker(Rows(), 19, 7)
    for number, length in enumerate(lengths):
        conversation = np.full((2, length), number, np.uint16)
        conversation[1] = 0
        conversation[1, 0] = FIRST
        packer.add(conversation)
    packer.finish()
    used = sorted(int((~(row[1] & PADDING).astype(bool)).sum()) for row in rows)
    assert sum(used) == sum(lengths) and (len(used) < 2 or used[0] + used[1] > 20)
    packed = [one for row in rows for one in split_conversations(row) if not one[1, 0] & PADDING]
    assert sorted((int(one[0, 0]), one.shape[1]) for one in packed) == list(enumerate(lengths))


def test_a_batch_has_labels_in_completions_and_attention_inside_conversations(tokenizer, tmp_path):
    conversations = some_conversations(80)
    convert_chat(write_lines(tmp_path / "a.jsonl", conversations), tokenizer, tmp_path / "out", heldout=0.1)
    stream = ReplicaStream(
        tmp_path / "out",
        "train",
        seq_len=SEQ_LEN,
        vocab_size=VOCAB_SIZE,
        global_batch=1,
        micro_batch=1,
        replica=0,
        num_replicas=1,
        seed=0,
        shuffle=False,
    )
    for i, window in enumerate(read_windows(tmp_path / "out", "train")):
        (batch,) = stream.step(i)
        tokens, flags = np.array(window).reshape(2, -1).tolist()
        assert batch.input_ids.tolist() == [tokens[:-1]]
        expected = [token if flag & IN_LOSS else -100 for token, flag in zip(tokens[1:], flags[1:], strict=True)]
        assert batch.labels.tolist() == [[expected]] and batch.final_labels.tolist() == [expected]
        document, documents = -1, []
        for flag in flags[:-1]:
            document += bool(flag & FIRST)
            documents.append(document)
        assert batch.document_ids.tolist() == [documents]
        assert any(label != -100 for label in expected)


# --- bad input


def test_a_bad_line_is_named_or_skipped(tokenizer, tmp_path):
    good = {"prompt": "a", "completion": "b"}
    lines = [good, {"prompt": "x"}, {"messages": []}, {"prompt": "a <|end|>", "completion": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, good]))
    with pytest.raises(UserError, match=r"a\.jsonl:2: cannot be read \(no key 'messages'"):
        convert_chat(tmp_path / "a.jsonl", tokenizer, tmp_path / "out")
    manifest = convert_chat(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", skip_bad=True)
    assert [one.where for one in manifest.skipped] == ["line 2", "line 3", "line 4"]
    assert "no assistant message" in manifest.skipped[1].reason
    assert "message 1 contains the text of the special token <|end|>" in manifest.skipped[2].reason
    assert manifest.documents.written == 2


def test_conversations_without_completion_tokens_are_refused(tokenizer, tmp_path):
    """All of them are so long that a window has only the prompt; nothing is left."""
    lines = write_lines(tmp_path / "a.jsonl", [[("user", "long " * 20), ("assistant", "x")]] * 3)
    with pytest.raises(UserError, match="no conversation has a completion token among its first 64 tokens"):
        convert_chat(lines, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_formats_and_other_settings_are_refused(tokenizer, tmp_path, write_parquet):
    with pytest.raises(UserError, match=r"a\.parquet: is parquet; conversations are read from JSON lines only"):
        convert_chat(write_parquet(messages=["x"]), tokenizer, tmp_path / "out")
    lines = write_lines(tmp_path / "a.jsonl", some_conversations(5))
    with pytest.raises(UserError, match=r"no key 'text'.*conversations are converted with --format chat"):
        convert(lines, tokenizer, SEQ_LEN, tmp_path / "out", quiet=True)
    convert_chat(lines, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="chat="):
        convert_chat(lines, tokenizer, tmp_path / "out", template="plain")
    with pytest.raises(UserError, match="text_column=text, but these shards were made with messages"):
        convert(lines, tokenizer, SEQ_LEN, tmp_path / "out", quiet=True, columns=Columns(sample_by="line"))


def test_damaged_flags_are_found(tokenizer, tmp_path):
    """A shard whose hashes are right, but whose mask is not the one that was counted."""
    out = tmp_path / "out"
    convert_chat(write_lines(tmp_path / "a.jsonl", some_conversations(20)), tokenizer, out)
    windows = np.array(read_windows(out, "train"), np.uint16)
    windows[0, -1] ^= IN_LOSS
    writer = ShardWriter(out / "train" / "part-tails", 2 * SEQ_LEN + 1, "uint16", prefix="part-tails/")
    writer.add(windows.ravel())
    writer.finish()
    (out / "train" / "index.json").write_text(json.dumps({"version": 2, "shards": writer.shards}, sort_keys=True))
    assert any("loss token" in problem for problem in verify(out).problems)


def test_compressed_lines_and_shards(tokenizer, tmp_path):
    conversations = some_conversations(30)
    lines = write_lines(tmp_path / "a.jsonl", conversations)
    (tmp_path / "b.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines.read_bytes(), asbytes=True))
    convert_chat(lines, tokenizer, tmp_path / "plain", heldout=0.01)
    manifest = convert_chat(tmp_path / "b.jsonl.zst", tokenizer, tmp_path / "out", heldout=0.01, compression="zstd")
    assert manifest.splits == read_shard_manifest(tmp_path / "plain").splits and manifest.heldout_by == "window"
    assert verify(tmp_path / "out").ok
