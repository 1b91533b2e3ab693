"""Real English text from Debian's documentation packages, as parquet in FineWeb-Edu's schema: a corpus for benchmarks.

One document per file: HTML is converted to text without scripts, menus and tables of contents; .txt and .rst are kept.
`token_count` is the number of words; the scores are constants.
The same package versions give the same bytes; the versions are those of the machine's own Debian or Ubuntu release.
Packages are downloaded with apt-get and not installed: no root is needed, but `apt-get update` must have run.
"""

import argparse
import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mythos_dist.errors import UserError, exit_with

PACKAGES = """anarchism debian-handbook debian-policy debian-reference-en developers-reference git-doc
    libreoffice-help-en-us linux-doc postgresql-doc python3-doc""".split()
WANTED = re.compile(r"\.(html|xhtml|txt|rst)(\.gz)?$")
# Sources and one-page copies of HTML pages, translations, indexes, device tree bindings.
UNWANTED = re.compile(
    r"/_sources/|/_static/|/translations/|/html/(?!en-US/)[a-z]{2}-[A-Z]{2}/|/Documentation/.*\.rst|/devicetree/"
    r"|/(genindex|search|py-modindex|bookindex|changelog|copyright|license|robots)[^/]*$"
    r"|debian-reference\.en\.txt|policy-1\.",
    re.IGNORECASE,
)
DROPPED_TAGS = set("script style head nav header footer aside form button select".split())
DROPPED_NAMES = set(  # classes and ids
    "banner contents docnav footer headerlink navfooter navheader page-links related toc toctree-wrapper".split()
) | {"sphinxsidebar"}
PARAGRAPH_TAGS = set("p div section article h1 h2 h3 h4 h5 h6 pre ul ol dl table blockquote hr".split())
LINE_TAGS = set("br li dt dd tr caption".split())
MIN_CHARACTERS = 200
NUM_FILES = 2
ROWS_PER_GROUP, BYTES_PER_GROUP = 1000, 1 << 20  # whichever is reached first ends a row group
SCHEMA = pa.schema(
    dict.fromkeys("text id dump url file_path language".split(), pa.string())
    | dict(language_score=pa.float64(), token_count=pa.int64(), score=pa.float64(), int_score=pa.int64())
)


class _Text(HTMLParser):
    """A page's text in `pieces`, with newlines around blocks; reset where the page marks its main part."""

    def __init__(self, html: str):
        super().__init__()
        self.pieces = ["\n"]
        self.in_pre = 0  # open <pre> elements: their white space is kept
        self.dropped_tag, self.in_dropped = "", 0  # the element being left out, and its nesting depth
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        names = f"{attributes.get('class')} {attributes.get('id')}".split()
        if self.in_dropped:
            self.in_dropped += tag == self.dropped_tag
        elif tag in DROPPED_TAGS or not DROPPED_NAMES.isdisjoint(names):
            self.dropped_tag, self.in_dropped = tag, 1
        elif attributes.get("role") == "main" or "DisplayArea" in names:  # Sphinx; LibreOffice
            self.pieces = ["\n"]
        else:
            self.in_pre += tag == "pre"
            self.break_line(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.in_dropped:
            self.in_dropped -= tag == self.dropped_tag
        else:
            self.in_pre = max(0, self.in_pre - (tag == "pre"))
            self.break_line(tag)

    def handle_data(self, data: str) -> None:
        if not self.in_pre:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self.pieces[-1].endswith(("\n", "\t", " ")) else data
        if data and not self.in_dropped:
            self.pieces.append(data)

    def break_line(self, tag: str) -> None:
        if tag in PARAGRAPH_TAGS or tag in LINE_TAGS:
            self.pieces.append("\n\n" if tag in PARAGRAPH_TAGS else "\n")
        elif tag in ("td", "th") and not self.pieces[-1].endswith(("\n", "\t")):
            self.pieces.append("\t")


def download(package: str, cache: Path) -> Path:
    """Download the package to `cache` unless it exists. Raises UserError if the download fails."""
    _progress(f"downloading {package}")
    shown = subprocess.run(["apt-cache", "show", "--no-all-versions", package], capture_output=True, text=True).stdout
    # linux-doc, python3-doc and postgresql-doc are empty: each depends on the one of this release's version.
    for other in re.findall(r"[a-z][\w.+-]+", shown.partition("\nDepends: ")[2].partition("\n")[0]):
        if re.sub(r"-?\d[\d.]*", "", other) == re.sub(r"-?\d[\d.]*", "", package):
            package = other
    if not list(cache.glob(f"{package}_*.deb")):
        cache.mkdir(parents=True, exist_ok=True)
        got = subprocess.run(["apt-get", "download", package], cwd=cache, capture_output=True, text=True)
        if got.returncode:
            why = " ".join(line for line in got.stderr.splitlines() if line.startswith("E:")) or "apt-get failed"
            raise UserError(f"package {package} cannot be downloaded ({why}); run `apt-get update` and try again")
    return max(cache.glob(f"{package}_*.deb"))


def documents(package: Path) -> list[tuple[str, str]]:
    """Path and text of the package's documents that are long enough, sorted by path."""
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True)
    if unpacked.returncode:
        raise UserError(f"{package}: damaged Debian package; delete it and run this again")
    texts = []
    with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as archive:
        members = {entry.name.removeprefix("./"): entry for entry in archive}
        for path in sorted(filter(WANTED.search, members)):
            twin = re.sub(r"\.txt(\.gz)?$", ".html", path)  # a page, or a folder of them, with the same text
            file = archive.extractfile(members[path]) if members[path].isfile() else None
            if file is None or UNWANTED.search(path) or (twin != path and twin in members):
                continue
            content = gzip.decompress(file.read()) if path.endswith(".gz") else file.read()
            text = content.decode("utf-8", "replace")
            text = "".join(_Text(text).pieces) if re.search(r"\.x?html(\.gz)?$", path) else text
            text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t\r\f]+\n", "\n", text)).strip()
            if len(text) >= MIN_CHARACTERS:
                texts.append((path, text))
    return texts


def debian_text(folder: Path) -> list[Path]:
    """Build the corpus below `folder` and return its parquet files; does nothing if they exist.

    Packages stay in folder/packages. Raises UserError if the machine has no apt-get or a download fails.
    """
    files = [folder / f"debian-{part}.parquet" for part in range(NUM_FILES)]
    if all(file.exists() for file in files):
        return files
    if missing := [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(tool) is None]:
        raise UserError(
            f"{', '.join(missing)} not found; run this on Debian or Ubuntu, whose packages contain the text"
        )
    packages = [download(name, folder / "packages") for name in PACKAGES]
    rows: dict[str, dict] = {}  # by text: exact duplicates are dropped
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for package, texts in zip(packages, pool.map(documents, packages), strict=True):
            _progress(f"read {package.name}")
            name, version = package.stem.replace("%3a", ":").split("_")[:2]
            row = dict(dump=f"{name}_{version}", url=f"https://packages.debian.org/{name}")
            row |= dict(language="en", language_score=1.0, score=4.0, int_score=4)
            for path, text in texts:
                digest = hashlib.sha256(text.encode()).hexdigest()
                own = dict(text=text, id=digest, file_path=f"{name}/{path}", token_count=len(text.split()))
                rows.setdefault(text, row | own)
    parts: list[list[dict]] = [[] for _ in files]
    share, seen = sum(len(row["text"]) for row in rows.values()) / NUM_FILES, 0
    for row in sorted(rows.values(), key=lambda row: row["file_path"]):
        parts[min(int(seen / share), NUM_FILES - 1)].append(row)
        seen += len(row["text"])
    for file, part in zip(files, parts, strict=True):
        _write(part, file.with_suffix(".tmp"))
    for file in files:
        os.replace(file.with_suffix(".tmp"), file)
    _progress("")
    return files


def _write(rows: list[dict], file: Path) -> None:
    """Write a parquet file; a row group ends at ROWS_PER_GROUP rows or BYTES_PER_GROUP bytes of text."""
    with pq.ParquetWriter(file, SCHEMA) as writer:
        group, size = [], 0
        for number, row in enumerate(rows):
            group.append(row)
            size += len(row["text"].encode())
            if len(group) == ROWS_PER_GROUP or size >= BYTES_PER_GROUP or number == len(rows) - 1:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                group, size = [], 0


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line and build the corpus, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/debian-text"), help="folder (%(default)s)")
    folder = parser.parse_args().out
    try:
        files = debian_text(folder)
    except UserError as error:
        exit_with(error)
    texts = [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {megabytes:.1f} MB of text: {' '.join(map(str, files))}")


if __name__ == "__main__":
    main()
