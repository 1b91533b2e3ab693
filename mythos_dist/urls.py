"""URLs of files and folders: which texts are URLs, names below them, and the secrets that they must not hold."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from mythos_dist.errors import redact


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of a store, with the part of pathlib's interface that does no input or output.

    Its text, for messages and records, is without secrets. The trap: pathlib.Path("s3://bucket") is s3:/bucket.
    """

    url: str

    def __str__(self) -> str:
        return redact(self.url) if has_secrets(self.url) else self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(join_url(self.url, name))

    @property
    def name(self) -> str:
        """The last part; empty for a bucket or host."""
        return self._parts()[1].rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """The folder that it is in; of a bucket or host, itself."""
        root, path, query = self._parts()
        return RemotePath(root + (f"/{path.rpartition('/')[0]}" if "/" in path else "") + query)

    def expanduser(self) -> "RemotePath":
        """Itself: a URL has no home."""
        return self

    def _parts(self) -> tuple[str, str, str]:
        """Scheme and host, the path without slashes at its ends, and the query with its mark."""
        scheme, _, rest = self.url.partition("://")
        rest, mark, query = rest.partition("?") if scheme in ("http", "https") else (rest, "", "")
        host, _, path = rest.partition("/")
        return f"{scheme}://{host}", path.strip("/"), mark + query


AnyPath = Path | RemotePath


def any_path(text: str) -> AnyPath:
    """A local path, or the URL of a file or folder in a store."""
    return RemotePath(text) if is_url(text) else Path(text)


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
    """Whether a URL contains a password, or a parameter that gives access. False for text that is not a valid URL."""
    try:
        user = urlsplit(url).netloc.rpartition("@")[0]
    except ValueError:
        return False
    return ":" in user or (scheme_of(url) in ("http", "https") and bool(user or without_secrets(url) != _plain(url)))


def _plain(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(query=urlencode(parse_qsl(parts.query)), fragment="").geturl()
