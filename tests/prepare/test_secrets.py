"""Passwords and signatures in URLs appear in no file and no message, and do not identify a conversion."""

import gzip
import json

import pytest
from helpers.conversion import contents
from helpers.http_server import serving

from mythos_dist.errors import UserError, redact
from mythos_dist.prepare import convert as convert_module
from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.listing import find_sources, list_inputs

SIGNED = "X-Amz-Credential=AKIDEXAMPLE&X-Amz-Signature=5ec3e7&sig=a%2Fb5ec3e7&token=hf_5ec3e75ec3e7"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(convert_module, "RETRY_SECONDS", 0.01)


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"https://user:5ec3e7@host/a.parquet?{SIGNED}", "https://***@host/a.parquet?***"),
        ("https://user:5ec/3e7@host:8080/a", "https://***@host:8080/a"),
        ("https://user:p@5ec3e7@host/a", "https://***@host/a"),
        ("https://ghp_5ec3e7@host/a", "https://***@host/a"),
        ("HTTPS://host/a?5ec3e7", "HTTPS://host/a?***"),
        ("https://host/a#access_token=5ec3e7", "https://host/a?***"),
        ("s3://KEY:5ec3e7@bucket/a?.parquet", "s3://***@bucket/a?.parquet"),
        ("failed (url=URL('https://host/a?sig=5ec3e7')) again", "failed (url=URL('https://host/a?***')) again"),
        ("url: /a?X-Amz-Signature=5ec3e7&x=1 (Caused", "url: /a?X-Amz-Signature=***&x=1 (Caused"),
        ("{'token': '5ec3e7', 'anon': False}", "{'token': '***', 'anon': False}"),
        ("Authorization: Bearer 5ec3e75ec3e7", "Authorization: Bearer ***"),
        ("hf_5ec3e75ec3e7", "hf_***"),
        # not secret
        ("https://host:8080/a@v2/x.parquet", "https://host:8080/a@v2/x.parquet"),
        ("hf://datasets/org/name@main/*.parquet", "hf://datasets/org/name@main/*.parquet"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        (
            "limit_tokens=7, eos_token=</s>, tokenizer_sha256=12ab",
            "limit_tokens=7, eos_token=</s>, tokenizer_sha256=12ab",
        ),
        ("/data/what?.jsonl", "/data/what?.jsonl"),
    ],
)
def test_secrets_in_texts_are_redacted(text, shown):
    assert redact(text) == shown == redact(shown) and "5ec" not in shown
    assert str(UserError([text], text)) == f"{shown}: {shown}"


def test_redaction_of_any_text_is_fast():
    """Messages may contain a megabyte of arbitrary text."""
    for text in ("a" * 10**6, "a://" * 10**5, "https://" + "a:" * 10**5, "token=" * 10**5, "x?" * 10**5):
        assert redact(text)


def test_a_signed_url_leaves_no_secret_and_another_signature_gives_the_same_conversion(tmp_path, byte_tokenizer, capfd):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(30)))
    (folder / "b.jsonl").write_text('{"text": 7}\n{"text": "some more text"}\n')
    out = tmp_path / "out"

    def run(url, query, **options):
        inputs = [url.replace("://", "://user:5ec3e7@") + f"/{name}?{query}" for name in ("a.jsonl", "b.jsonl")]
        return convert([*inputs, inputs[0]], byte_tokenizer, 4, out, heldout=0, skip_bad=True, **options)

    with serving(folder) as (url, _):
        manifest = run(url, SIGNED)
        assert manifest.documents.written == 31 and [one.name for one in manifest.inputs] == ["a.jsonl", "b.jsonl"]
        before = contents(out)
        assert run(url, SIGNED.replace("5ec3e7", "0ther")) == manifest and contents(out) == before
    printed = capfd.readouterr()
    assert "already converted with these settings" in printed.err
    assert "the same file as another: a.jsonl" in printed.err
    for text in (printed.out, printed.err, *(content.decode("latin-1") for content in before.values())):
        assert not {"5ec3e7", "0ther", "AKIDEXAMPLE"} & {
            word for word in ("5ec3e7", "0ther", "AKIDEXAMPLE") if word in text
        }


def test_network_errors_show_no_secret(tmp_path, byte_tokenizer):
    """Messages of network libraries contain the URL."""
    (tmp_path / "a.jsonl").write_text('{"text": 7}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"text")[:-8])
    with serving(tmp_path) as (url, _):
        signed = url.replace("://", "://user:5ec3e7@")
        for name in ("absent.parquet", "folder", "*.parquet", "a.jsonl", "b.jsonl.gz"):
            with pytest.raises(UserError) as error:
                convert(f"{signed}/{name}?{SIGNED}", byte_tokenizer, 4, tmp_path / "out", quiet=True)
            assert "5ec3e7" not in str(error.value) and "AKID" not in str(error.value), name
    for given in (f"http://user:5ec3e7@127.0.0.1:9/a.jsonl?{SIGNED}", f"nothing://user:5ec3e7@host/a?{SIGNED}"):
        with pytest.raises(UserError) as error:
            find_sources(given)
        assert "5ec3e7" not in str(error.value)


def test_names_of_files_on_several_hosts_contain_no_user(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    with serving(tmp_path) as (one, _), serving(tmp_path) as (two, _):
        sources = list_inputs(
            [f"{url.replace('://', '://user:5ec3e7@')}/a.jsonl?{SIGNED}" for url in (one, two)]
        ).sources
    assert [source.name for source in sources] == [url.removeprefix("http://") + "/a.jsonl" for url in (one, two)]
