"""`data.mix_end`: the mix as a function of the position in the data, in runs."""

import json
import signal
from pathlib import Path

import pytest
from helpers.launch import train

from mythos_dist.config.dump import dump_config
from mythos_dist.config.load import load_config
from mythos_dist.data.corpora import open_corpora
from mythos_dist.data.stream import ReplicaStream
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError
from mythos_dist.ops.report.run import read_run
from mythos_dist.prepare.convert import convert
from mythos_dist.train.metrics import batch_id

pytestmark = [pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def folders(shards, tmp_path_factory) -> list[Path]:
    """Three folders of shards of the same text and tokenizer; they differ in what is held out."""
    work = tmp_path_factory.mktemp("mix")
    found = [work / name for name in "abc"]
    for folder, heldout in zip(found, (0.1, 0.2, 0.3), strict=True):
        convert(
            shards.parent / "corpus.parquet",
            Tokenizer.load(shards.parent / "tokenizer.model"),
            32,
            folder,
            heldout=heldout,
            quiet=True,
        )
    return found


def expected_ids(stream: ReplicaStream, sizes: list[int]) -> list[str]:
    """The batch_id of consecutive batches of these sizes."""
    positions = [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    return [batch_id([int(stream.step(position)[0].sample_ids) for position in batch]) for batch in positions]


@pytest.mark.launch
def test_a_run_with_a_changing_mix_and_batch_reads_the_same_samples_at_every_layout(settings, folders, tmp_path):
    """From 1 : 3 : 0 to 0 : 1 : 1 over samples 8 to 24, with batches of 2, then 4. Killed on two ranks inside the
    change it resumes as a pipeline. Against one process that reads sample by sample; the corpora by count."""
    a, b, c = map(str, folders)
    mixes = [f"data.mix={{{a}: 1, {b}: 3}}", f"data.mix_end={{{b}: 0.5, {c}: 0.5}}", "data.mix_samples=[8,24]"]
    common = [one for one in settings if not one.startswith(("data.path", "train.steps"))]
    run = [*common, *mixes, "data.path=null", "train.steps=9", "train.batch_ramp=[[2,4]]", "train.global_batch=4"]
    run += ["train.micro_batch=1"]
    run += ["checkpoint.every=1", f"run.dir={tmp_path / 'run'}"]
    file = tmp_path / "run" / "checkpoints" / "step-00000005" / "checkpoint.json"
    assert train(2, *run, env={"KILL_AFTER": str(file)}).codes == [-signal.SIGKILL] * 2
    result = train(2, *run, "parallel.pipe=2")
    assert result.codes == [0, 0], result.tails
    corpora = open_corpora(
        {a: 1, b: 3}, seq_len=32, vocab_size=512, splits=["train"], mix_end={b: 1, c: 1}, change=(8, 24)
    )
    stream = ReplicaStream(
        corpora, "train", seq_len=32, vocab_size=512, global_batch=1, micro_batch=1, replica=0, num_replicas=1, seed=0
    )
    found = [json.loads(text)["batch_id"] for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found == expected_ids(stream, [2, 2, 2, 2, 4, 4, 4, 4, 4])
    ids = [int(stream.step(position)[0].sample_ids) for position in range(48)]
    ends = [corpora[0].manifest.splits["train"].windows]
    ends.append(ends[0] + corpora[1].manifest.splits["train"].windows)
    of = [sum(one >= end for end in ends) for one in ids]  # the corpus of each sample
    assert [of[:8].count(i) for i in range(3)] == [2, 6, 0]
    assert [of[24:].count(i) for i in range(3)] == [0, 12, 12]
    assert len(set(ids)) == 48  # no sample twice
    seen = read_run(tmp_path / "run").metrics.corpora.values()  # 28 samples, of two starts
    windows = [corpus.manifest.splits["train"].windows for corpus in corpora]
    counts = [of[:28].count(i) for i in range(3)]
    assert [(one.name, one.tokens) for one in seen] == [
        (name, 32 * n) for name, n in zip((a, b, c), counts, strict=True)
    ]
    assert [one.epochs for one in seen] == pytest.approx([n / own for n, own in zip(counts, windows, strict=True)])
    changed = train(1, *run, "data.mix_samples=[8,25]", "train.steps=10")
    assert changed.codes == [2] and "8-25: 0, 1, 1, but the run was trained with 8-24: 0, 1, 1" in changed.err


MIX = "data: {mix: {a: 0.7, b: 0.3}, mix_end: {b: 1, c: 3}, mix_samples: [100, 200]}"


def test_a_changing_mix_comes_back_from_its_dump_and_a_later_path_replaces_all_of_it(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(MIX)
    config = load_config(tmp_path / "a.yaml")
    assert config.data.mix_end == {"b": 1, "c": 3} and config.data.mix_samples == (100, 200)
    assert config.data.folders == pytest.approx({"a": 0.35, "b": 0.275, "c": 0.375})
    (tmp_path / "b.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "b.yaml") == config
    replaced = load_config(tmp_path / "a.yaml", ["data.path=shards"]).data
    assert (replaced.folders, replaced.mix_end, replaced.mix_samples) == ({"shards": 1.0}, None, None)
    assert "data.path of the command line replaces data.mix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.mix_samples=null", "data.mix_end is set, but data.mix_samples is not; set both, or none"),
        ("data.mix_end=null", "data.mix_samples is set, but data.mix_end is not; set both, or none"),
        ("data.mix_samples=[200,100]", "data.mix_samples=[200, 100] ends before it begins; set it to [100, 200]"),
        ("data.mix_samples=[100]", "data.mix_samples=[100]: expected two whole numbers, such as [1000, 2000]"),
        ("data.mix_samples=[-1,100]", "data.mix_samples=[-1, 100] contains [-1]; each must not be negative"),
        ("data.mix_end={}", "data.mix_end={} names no folder"),
        ("data.mix_end={c: 0}", "data.mix_end[c]=0.0 must be above 0"),
        ("data.mix_end={b: 1, c: 1e12}", "data.mix_end[b]=1.0 is less than a billionth of all weights"),
    ],
)
def test_a_wrong_change_is_one_message(tmp_path, override, words):
    (tmp_path / "a.yaml").write_text(MIX)
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "a.yaml", [override])
    (problem,) = refused.value.problems
    assert words in problem


def test_held_out_samples_are_read_in_the_mean_of_both_mixes(folders):
    """1 : 3 : 0 and 0 : 1 : 1 have the mean 1 : 5 : 2."""
    a, b, c = map(str, folders)
    corpora = open_corpora({a: 1, b: 3}, seq_len=32, vocab_size=512, mix_end={b: 1, c: 1}, change=(0, 10))
    stream = ReplicaStream(
        corpora,
        "heldout",
        seq_len=32,
        vocab_size=512,
        global_batch=8,
        micro_batch=8,
        replica=0,
        num_replicas=1,
        seed=0,
        shuffle=False,
    )
    ids = stream.step(0)[0].sample_ids.tolist()
    first = corpora[0].manifest.splits["heldout"].windows
    second = first + corpora[1].manifest.splits["heldout"].windows
    assert [
        sum(low <= one < high for one in ids) for low, high in ((0, first), (first, second), (second, 1 << 60))
    ] == [
        1,
        5,
        2,
    ]
