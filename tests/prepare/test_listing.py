"""The files that a folder, a pattern or a URL selects; all others are listed with the reason."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mythos_dist.data.manifest import read_shard_manifest
from mythos_dist.errors import UserError
from mythos_dist.prepare import local_files
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.corpus import sample_documents
from mythos_dist.prepare.listing import find_sources, list_inputs

DATA = ["a.parquet", "b.JSONL", "books/c.txt", "deep/er/d.jsonl.zst", "f.txt"]
NO_DATA = {
    ".hidden.jsonl": "hidden",
    "._a.parquet": "hidden",  # macOS
    "_SUCCESS": "hidden",
    "LICENSE.txt": "documentation",
    "README.md": "documentation",
    "books/README-fr.md": "documentation",
    "dataset_infos.json": "metadata",
    "deep/notes.md": "notes (.md) beside parquet or JSON lines",
    "deep/table.csv": "format not read (.csv)",
    "g.parquet.crc": "format not read (.parquet.crc)",
    "g.parquet.incomplete": "format not read (.parquet.incomplete)",
    "name": "format not read (no suffix)",
    "old.tar.gz": "format not read (.tar.gz)",
}
HIDDEN_FOLDERS = [".git/", ".ipynb_checkpoints/", "__MACOSX/", "_temporary/", "books/.cache/"]


@pytest.fixture
def folder(tmp_path):
    """DATA, NO_DATA and data in HIDDEN_FOLDERS; each file has another size."""
    top = tmp_path / "corpus"
    for i, name in enumerate([*DATA, *NO_DATA, *(f"{hidden}x.txt" for hidden in HIDDEN_FOLDERS)]):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"x" * (i + 1))
    return top


def left_out(listing):
    return {one.name: one.reason.split(" (the")[0] for one in listing.left_out}


def in_memory(folder):
    """Copy a folder to fsspec's memory file system; returns its URL."""
    import fsspec

    memory = fsspec.filesystem("memory")
    if memory.exists("/listing"):
        memory.rm("/listing", recursive=True)
    for file in folder.rglob("*"):
        if file.is_file():
            memory.pipe(f"/listing/{file.relative_to(folder)}", file.read_bytes())
    return "memory://listing"


@pytest.mark.parametrize("form", ["folder", "folder/", "**", "**/*", "*", "memory", "memory **/*", "memory *"])
def test_a_folder_its_patterns_and_a_remote_copy_give_the_same_files(folder, form):
    if form.startswith("memory"):
        given = in_memory(folder) + form.removeprefix("memory").replace(" ", "/")
    else:
        given = {"folder": str(folder), "folder/": f"{folder}/"}.get(form) or f"{folder}/{form}"
    listing = list_inputs(given)
    assert [source.name for source in listing.sources] == DATA
    assert len(listing.left_out) == len(NO_DATA) + len(HIDDEN_FOLDERS)
    assert left_out(listing) == {**NO_DATA, **dict.fromkeys(HIDDEN_FOLDERS, "hidden")}


def test_a_file_given_by_name_is_taken_whatever_its_name(folder):
    names = ["README.md", ".hidden.jsonl", "dataset_infos.json", "_temporary/x.txt"]
    listing = list_inputs([folder / name for name in names])
    assert [source.name for source in listing.sources] == names and not listing.left_out
    assert [source.name for source in find_sources(f"{folder}/**/.*.jsonl")] == [".hidden.jsonl"]
    assert [source.name for source in find_sources(f"{folder}/*/README-fr.md")] == ["README-fr.md"]
    assert [source.name for source in find_sources(folder / "_temporary")] == ["x.txt"]


def test_markdown_documentation_is_text_if_all_files_are_markdown(tmp_path):
    for name in ("README.md", "guide.md", "api/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [source.name for source in find_sources(tmp_path)] == ["README.md", "api/README.md", "guide.md"]
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("text")
    (tmp_path / "books" / "README.md").write_text("about these books")
    assert [source.name for source in find_sources(tmp_path / "books")] == ["a.txt"]


def test_links_are_followed_each_file_is_read_once_and_cycles_end(tmp_path):
    top, other = tmp_path / "top", tmp_path / "other"
    for file in (top / "real" / "a.txt", top / "b.txt", other / "c.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    (top / "a-link.txt").symlink_to(top / "real" / "a.txt")
    os.link(top / "b.txt", top / "hard.txt")
    (top / "elsewhere").symlink_to(other)
    (top / "again").symlink_to(top / "real")
    (other / "up").symlink_to(top)
    (top / "gone.txt").symlink_to(tmp_path / "gone")
    (top / "self.txt").symlink_to(top / "self.txt")
    os.mkfifo(top / "pipe.txt")
    listing = list_inputs([top, top / "b.txt", f"{top}/*/a.txt"])
    assert [source.name for source in listing.sources] == ["b.txt", "elsewhere/c.txt", "real/a.txt"]
    assert left_out(listing) == {
        "a-link.txt": "the same file as another",
        "hard.txt": "the same file as another",
        "b.txt": "the same file as another",
        "real/a.txt": "the same file as another",  # of the pattern
        "again/": "a folder that was read before",
        "elsewhere/up/": "a folder that was read before",
        "gone.txt": "a broken link",
        "self.txt": "a broken link",
        "pipe.txt": "neither a file nor a folder",
    }
    assert {one.detail for one in listing.left_out if one.name == "hard.txt"} == {"b.txt"}


@pytest.mark.parametrize("name, problem", [("gone.txt", "is a broken link"), ("pipe", "is neither a file nor a")])
def test_a_path_that_is_neither_file_nor_folder_is_an_error(tmp_path, name, problem):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"{name}: {problem}"):
        find_sources(tmp_path / name)


def test_patterns_are_matched_as_the_shell_does(folder):
    names = {
        "*.parquet": ["a.parquet"],
        "d*": ["d.jsonl.zst"],  # a folder that matches selects everything below it
        "deep/**/*.zst": ["d.jsonl.zst"],
        "**/er/*": ["d.jsonl.zst"],
        "[ab].*": ["a.parquet", "b.JSONL"],
        "?ooks/*": ["c.txt"],
        "**/**/*.txt": ["books/c.txt", "f.txt"],
    }
    for pattern, expected in names.items():
        assert [source.name for source in find_sources(f"{folder}/{pattern}")] == expected, pattern
    shutil.copytree(folder / "books", folder.parent / "books [1]")
    assert [source.name for source in find_sources(f"{folder.parent}/books [1]/*.txt")] == ["c.txt"]
    assert left_out(list_inputs(f"{in_memory(folder)}/*/*.txt")) == left_out(list_inputs(f"{folder}/*/*.txt")) == {}
    for pattern in ("*.pq", "absent/*", "*/*/*/*/*.txt"):
        with pytest.raises(UserError, match="as a pattern it matches nothing"):
            find_sources(f"{folder}/{pattern}")


def test_a_folder_without_data_is_refused_with_what_it_contains(tmp_path):
    for name in ("a.csv", "b.csv", "._c.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"no file there is named .*; left out: 2 format not read \(.csv\), 1 hidden"):
        find_sources(tmp_path)


def test_an_unreadable_folder_stops_the_conversion_or_is_listed(folder, byte_tokenizer, tmp_path, monkeypatch):
    """Permissions do not apply to root, so os.scandir is replaced."""
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("books"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(local_files.os, "scandir", denied)
    for name in ("a.parquet", "b.JSONL", "deep/er/d.jsonl.zst"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"books/: cannot be read \(Permission denied\)"):
        convert(folder, byte_tokenizer, 1, tmp_path / "out", quiet=True)
    with pytest.raises(UserError, match=r"books/: cannot be read \(Permission denied\)"):
        next(sample_documents(folder, 1000))
    manifest = convert(folder, byte_tokenizer, 1, tmp_path / "out", heldout=0, skip_bad=True, quiet=True)
    assert [(one.name, one.where) for one in manifest.skipped] == [("books/", "folder")]


def test_a_conversion_prints_its_inputs_and_lists_the_rest_in_its_manifest(tmp_path, byte_tokenizer, capsys):
    """The input folder contains the output and that of an earlier conversion: neither is read, also not by a second
    run of the command."""
    top = tmp_path / "top"
    top.mkdir()
    pq.write_table(pa.table({"text": ["a text of some length"] * 5}), top / "a.parquet")
    (top / "README.md").write_text("# About")
    (top / "more.csv").write_text("text\n1")
    (top / "x.txt").write_text("plain text")
    convert(top, byte_tokenizer, 4, top / "earlier", heldout=0, quiet=True)
    assert capsys.readouterr().err == ""
    manifest = convert(top, byte_tokenizer, 4, top / "out", heldout=0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"inputs: 2 files (1 parquet, 1 plain text), {sum(one.size for one in manifest.inputs) / 1e6:.1f} MB",
        "note: plain text is converted too: x.txt; to leave it out, give a pattern as input",
        "left out: 1 shards: earlier/",
        "left out: 1 documentation: README.md",
        "left out: 1 format not read (.csv): more.csv",
    ]
    assert (manifest.documents.read, len(manifest.inputs)) == (6, 2)
    assert read_shard_manifest(top / "out") == manifest
    reasons = {one.name: one.reason for one in manifest.left_out}
    assert (
        reasons.items()
        >= {"README.md": "documentation", "more.csv": "format not read (.csv)", "earlier/": "shards"}.items()
    )
    assert "files left out: " in manifest.summary() and "manifest.json lists them" in manifest.summary()
    assert convert(top, byte_tokenizer, 4, top / "out", heldout=0) == manifest
    assert "already converted" in capsys.readouterr().err


def test_files_given_by_name_print_no_listing(tmp_path, byte_tokenizer, capsys):
    (tmp_path / "a.txt").write_text("some text")
    manifest = convert(tmp_path / "a.txt", byte_tokenizer, 4, tmp_path / "out", heldout=0)
    assert capsys.readouterr().err == "" and manifest.left_out == ()
    convert([tmp_path / "a.txt"] * 2, byte_tokenizer, 4, tmp_path / "twice", heldout=0)
    assert "left out: 1 the same file as another: a.txt" in capsys.readouterr().err


def test_the_tokenizer_is_trained_on_the_files_that_are_converted(folder, capsys):
    for name in ("a.parquet", "b.JSONL", "deep/er/d.jsonl.zst", "deep/notes.md"):
        (folder / name).unlink()
    texts = sorted(sample_documents(folder, 1000, progress=True))
    assert texts == sorted((folder / name).read_text() for name in ("books/c.txt", "f.txt"))
    assert "hidden (the name begins with . or _): " in capsys.readouterr().err


def test_a_manifest_of_an_earlier_version_without_left_out_is_read(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text("some text")
    convert(tmp_path / "a.txt", byte_tokenizer, 4, tmp_path / "out", heldout=0, quiet=True)
    file = tmp_path / "out" / "manifest.json"
    content = json.loads(file.read_text())
    del content["left_out"], content["unknown_tokens"]
    file.write_text(json.dumps(content))
    assert read_shard_manifest(tmp_path / "out").left_out == ()


def test_file_names_of_any_bytes_are_printed_and_stored(tmp_path, byte_tokenizer, capsys):
    """Line breaks, terminal control sequences, and bytes that are not UTF-8."""
    top = tmp_path / "top"
    top.mkdir()
    names = [b"bad\xff.txt", b"line\nend.txt", b"red\x1b[31m.csv", b"gone\xff.txt.csv"]
    for name in names:
        (top / os.fsdecode(name)).write_text("some text")
    manifest = convert(top, byte_tokenizer, 4, tmp_path / "out", heldout=0)
    assert read_shard_manifest(tmp_path / "out") == manifest
    assert [one.name for one in manifest.inputs] == ["bad\\udcff.txt", "line\nend.txt"]
    printed = capsys.readouterr().err
    assert "red\\x1b[31m.csv" in printed and "\x1b" not in printed and len(printed.splitlines()) == 2
    printed.encode()
    with pytest.raises(UserError, match="an empty name; name a file, a folder or a pattern"):
        find_sources("")
