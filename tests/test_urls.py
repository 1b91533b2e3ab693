"""URLs are recognized, joined with names, and refused if they contain what gives access."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mythos_dist.urls import has_secrets, is_url, join_url


@pytest.mark.parametrize("text", ["s3://bucket/x", "hf://datasets/a/b", "file:///x", "https://h/x", "azure-dl://c/x"])
def test_urls_are_urls(text):
    assert is_url(text)


@pytest.mark.parametrize("text", ["shards", "/data/shards", "~/x", "c:/x", "./a://b", "S3://bucket", "", "://x"])
def test_paths_are_not(text):
    assert not is_url(text)


def test_names_are_joined_with_one_slash_and_before_a_query():
    assert join_url("s3://b/x/", "train", "index.json") == "s3://b/x/train/index.json"
    assert join_url("s3://b", "part-0/shard.0.mds") == "s3://b/part-0/shard.0.mds"
    assert join_url("https://h/x/?version=2", "a") == "https://h/x/a?version=2"
    assert join_url("s3://b/odd?name", "a") == "s3://b/odd?name/a", "a key of a bucket may have any character"


@pytest.mark.parametrize(
    "url",
    [
        "https://user:pass@host/x",
        "https://token@host/x",
        "sftp://user:pass@host/x",
        "https://host/x?X-Amz-Signature=abc",
        "https://host/x?a=1&sig=abc",
    ],
)
def test_what_gives_access_is_found(url):
    assert has_secrets(url)


@pytest.mark.parametrize(
    "url", ["s3://bucket/x", "sftp://user@host:22/x", "https://host:8080/x?version=2", "oci://bucket@space/x", "s3://["]
)
def test_what_does_not_is_accepted(url):
    assert not has_secrets(url)


@given(st.text(max_size=60))
def test_any_text_is_checked_without_an_error(text):
    assert has_secrets(f"https://{text}") in (True, False)
