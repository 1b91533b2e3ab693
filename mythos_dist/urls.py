"""URLs of files and folders: which texts are URLs, names below them, and the secrets that they must not hold."""

import re
from urllib.parse import parse_qsl, urlencode, urlsplit

from mythos_dist.errors import redact


def is_url(path: object) -> bool:
    """Whether `path` is read through a store, not by the operating system."""
    return re.match(r"[a-z][a-z0-9+.-]+://", str(path)) is not None


def scheme_of(url: str) -> str:
    """s3 of s3://bucket/folder."""
    return url.partition("://")[0]


def join_url(folder: str, *names: str) -> str:
    """The URL of a file in the folder `folder`: its query, if it has one, stays at the end."""
    path, mark, query = folder.partition("?") if scheme_of(folder) in ("http", "https") else (folder, "", "")
    return "/".join([path.rstrip("/"), *(name.strip("/") for name in names if name)]) + mark + query


def has_query(url: str) -> bool:
    """Whether the `?` of a URL begins its query, not a pattern: https://host/a.parquet?download=true."""
    parts = urlsplit(url)
    return parts.scheme in ("http", "https") and bool(parts.query) and not any(sign in parts.path for sign in "*[")


def without_secrets(url: str) -> str:
    """A URL without user and secret parameters: the same for the same file, whatever its signature."""
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query) if redact(f"{name}=x") == f"{name}=x"]
    host = parts.netloc.rpartition("@")[2] if parts.scheme in ("http", "https") else parts.netloc
    return parts._replace(netloc=host, query=urlencode(query), fragment="").geturl()


def has_secrets(url: str) -> bool:
    """Whether a URL contains a password, or a parameter that gives access. False for text that is no valid URL."""
    try:
        user = urlsplit(url).netloc.rpartition("@")[0]
    except ValueError:
        return False
    return ":" in user or (scheme_of(url) in ("http", "https") and bool(user or without_secrets(url) != _plain(url)))


def _plain(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(query=urlencode(parse_qsl(parts.query)), fragment="").geturl()
