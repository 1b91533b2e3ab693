"""Parquet in, documents out; what is not parquet is refused by name."""

from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mythos_dist.data.corpus import read_documents, write_sample_corpus
from mythos_dist.errors import UserError

FINEWEB_EDU = "text id dump url file_path language language_score token_count score int_score".split()


def write(file, **columns):
    pq.write_table(pa.table(columns), file)
    return file


def test_the_sample_corpus_is_pythons_help_in_finewebs_schema(corpus, tmp_path):
    assert pq.read_schema(corpus).names == FINEWEB_EDU
    assert sorted(read_documents(corpus)) == sorted(topics.values())
    assert write_sample_corpus(tmp_path / "again.parquet").read_bytes() == corpus.read_bytes()


def test_a_folder_a_glob_and_a_list_read_as_their_files_do(tmp_path):
    first = write(tmp_path / "a.parquet", text=["one", "two"])
    second = write(tmp_path / "b.parquet", text=["three"])
    (tmp_path / "readme.txt").write_text("not text to train on")
    for inputs in (tmp_path, str(tmp_path / "*.parquet"), [first, second], [first, tmp_path]):
        assert list(read_documents(inputs)) == ["one", "two", "three"]


def test_empty_texts_are_left_out_and_bad_bytes_replaced(tmp_path):
    texts = pa.array([b"caf\xc3\xa9", None, b"", b"bad \xff byte"], pa.binary()).cast(pa.string(), safe=False)
    assert list(read_documents(write(tmp_path / "a.parquet", text=texts))) == ["café", "bad \ufffd byte"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: at / "absent.parquet", "absent.parquet: no such file"),
        (lambda at: at, "holds no \\*.parquet"),
        (lambda at: str(at / "*.pq"), "matches nothing"),
        (lambda at: write(at / "a.parquet", body=["x"], url=["y"]), "a.parquet: no column 'text'.* body, url"),
        (lambda at: write(at / "a.parquet", text=[1, 2]), "a.parquet: column 'text' holds int64"),
    ],
)
def test_input_that_holds_no_documents_is_refused(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        list(read_documents(make(tmp_path)))


def test_a_file_that_is_not_whole_parquet_is_refused_by_name(corpus, tmp_path):
    whole = corpus.read_bytes()
    for name, content in [("text.parquet", b"hello"), ("empty.parquet", b""), ("cut.parquet", whole[:100_000])]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a parquet file, or cut short"):
            list(read_documents(tmp_path / name))


def test_a_file_damaged_inside_is_refused_by_name(corpus, tmp_path):
    """The footer is whole, so only reading finds it."""
    damaged = bytearray(corpus.read_bytes())
    damaged[4:50_000] = bytes(len(damaged[4:50_000]))
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged.parquet: cannot be read to its end"):
        list(read_documents(tmp_path / "damaged.parquet"))
