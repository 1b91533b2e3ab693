"""What `make demo` may remove: the folder of an earlier demo, and nothing else of that name."""

from pathlib import Path

import pytest

from mythos_dist.config.load import dump_config, load_config
from mythos_dist.errors import UserError
from mythos_dist.studies.earlier import make_room, remove_earlier_run

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
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
