"""Links of the built site: each leads to a file and a place on its page that exist; addresses outside are well formed.

Nothing is fetched: a build needs no network. Each page is parsed once.
"""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LINKS = {("a", "href"), ("link", "href"), ("img", "src"), ("script", "src"), ("source", "src")}


class _Page(HTMLParser):
    """The links and ids of a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.links: list[tuple[str, str]] = []  # (tag, address)
        self.ids: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is not None and (tag, name) in _LINKS:
                self.links.append((tag, value))
            elif value is not None and (name == "id" or (tag, name) == ("a", "name")):
                self.ids.add(value)


def problems(site: Path) -> list[str]:
    """What is wrong with the links of all pages below `site`, one line each."""
    pages = {file.resolve(): _Page(file) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        name = file.relative_to(site.resolve()).as_posix()
        found += [
            f"{name}: {address}: {wrong}"
            for tag, address in page.links
            if (wrong := _problem(tag, address, file, pages))
        ]
    return list(dict.fromkeys(found))


def _problem(tag: str, address: str, file: Path, pages: dict[Path, _Page]) -> str | None:
    try:
        parts = urlsplit(address)
    except ValueError as error:
        return str(error)
    if parts.scheme in ("http", "https"):
        if tag != "a":
            return "the page would load it from the network"
        return None if (parts.hostname and "." in parts.hostname) or parts.hostname == "localhost" else "no host"
    if parts.scheme:
        return None if parts.scheme in ("mailto", "data") else f"scheme {parts.scheme}"
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if not target.is_file():
        return "no such file"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
        return "no such place on that page"
    return None
