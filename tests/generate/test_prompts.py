"""Files of prompts: lines of text, or of JSON."""

import pytest

from mythos_dist.errors import UserError
from mythos_dist.generate.prompts import read_prompts


def test_lines_are_prompts_and_blank_ones_are_not(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('one\n\n two \n{"prompt": 3}\n')
    assert read_prompts(path) == ["one", " two ", '{"prompt": 3}']


def test_json_lines_are_texts_or_objects(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one\\ntwo"\n{"prompt": "three", "id": 1}\n')
    assert read_prompts(path) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    "line", ["{", "[1]", "3", '""', '{"text": "x"}', '{"prompt": null}', '"\\ud800"', "[" * 100000]
)
def test_all_lines_that_are_no_prompts_are_named(line, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"good"\n{line}\n"good"\n{line}\n')
    with pytest.raises(UserError) as raised:
        read_prompts(path)
    assert [problem.split(" is ")[0] for problem in raised.value.problems] == ["line 2", "line 4"]


@pytest.mark.parametrize(
    ("content", "named"), [(b"", "no prompts"), (b"\n \n", "no prompts"), (b"a\xff", "not valid UTF-8")]
)
def test_files_without_prompts_are_refused(content, named, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=named):
        read_prompts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")
