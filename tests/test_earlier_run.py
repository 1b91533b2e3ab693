"""What `make demo` may remove: an earlier demo, and nothing else of that name; and temporaries that are others'."""

from pathlib import Path

import pytest

from experiments.depth_task import make_depth_task
from mythos_dist.config.dump import dump_config
from mythos_dist.config.load import load_config
from mythos_dist.errors import UserError
from mythos_dist.ops.earlier_run import make_room, remove_earlier_run
from mythos_dist.prepare.corpus import write_sample_corpus
from mythos_dist.prepare.tokenizer_training import train_tokenizer

DEMO = str(Path(__file__).parents[1] / "configs" / "demo.yaml")
LAYOUTS = (("parallel.tensor=2",), ("parallel.pipe=2",))


def run(folder: Path, *overrides: str) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(load_config(DEMO, overrides)))
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def test_an_earlier_demo_is_removed_at_either_layout(tmp_path):
    for layout in LAYOUTS:
        make_room(run(tmp_path / "demo", *layout), DEMO, LAYOUTS)
        assert not (tmp_path / "demo").exists()
    make_room(tmp_path / "demo", DEMO, LAYOUTS)


@pytest.mark.parametrize("what", ["more steps", "another layout", "files", "file", "link", "no config"])
def test_another_run_in_its_place_is_refused(tmp_path, what, capsys):
    """`configs/demo.yaml` names runs/demo: who trains on from there loses nothing to the next `make demo`."""
    folder = tmp_path / "demo"
    if what == "file":
        folder.write_text("mine")
    elif what == "link":
        folder.symlink_to(run(tmp_path / "elsewhere", *LAYOUTS[0]))
    elif what == "files":
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    else:
        overrides = {"more steps": "train.steps=1000", "another layout": "parallel.zero=2"}.get(what, "train.steps=100")
        run(folder, overrides, *(LAYOUTS[0] if what != "another layout" else ()))
        if what == "no config":
            (folder / "config.yaml").unlink()
    with pytest.raises(SystemExit) as left:
        make_room(folder, DEMO, LAYOUTS)
    assert left.value.code == 2 and "move it away, or delete it" in capsys.readouterr().err
    assert folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    with pytest.raises(UserError, match=str(folder)):
        remove_earlier_run(folder, [])


def test_files_and_folders_named_tmp_of_a_user_stay(tmp_path):
    """Each was written over, or taken for what the tool had begun."""
    (tmp_path / "task.tmp").mkdir()
    for name in ("task.tmp/notes.txt", "corpus.parquet.tmp", "tokenizer.model.tmp"):
        (tmp_path / name).write_text("mine")
    make_depth_task(tmp_path / "task", hops=2, sequences=4, heldout=2)
    write_sample_corpus(tmp_path / "corpus.parquet")
    train_tokenizer(["some words to train on, again and again"] * 50, tmp_path / "tokenizer.model", 276)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("corpus.parquet", "corpus.parquet.tmp", "task", "task.tmp", "tokenizer.model", "tokenizer.model.tmp")
    ]
    for name in ("task.tmp/notes.txt", "corpus.parquet.tmp", "tokenizer.model.tmp"):
        assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "task" / "notes.txt").exists()
    with pytest.raises(UserError, match="cannot be written"):
        make_depth_task(tmp_path / "corpus.parquet" / "task", hops=2, sequences=4, heldout=2)
