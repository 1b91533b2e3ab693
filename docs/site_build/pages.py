"""Pages of the site that are made when it is built, in docs/reference/ (ignored by git).

settings.md, commands.md, python.md              made of the code; notebook.md of the notebook in examples/
decisions.md, changelog.md, contributing.md, …   files of the repository, with links that lead to pages of the site
"""

import os
import re
from pathlib import Path, PurePosixPath

from site_build import api, commands, notebook, settings

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
GENERATED = DOCS / "reference"
COPIES = {  # file of the repository -> its page
    "DECISIONS.md": "decisions.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "launch/README.md": "launch.md",
    "benchmarks/README.md": "benchmarks.md",
    "tests/README.md": "tests.md",
    "tests/cluster/README.md": "tests_cluster.md",
}
MADE = {  # file of the repository -> the page that is made of it
    "mythos_dist/config/schema.py": "settings.md",
    "mythos_dist/commands/__init__.py": "commands.md",
    "mythos_dist/__init__.py": "python.md",
    "examples/train_and_sweep.ipynb": "notebook.md",
}
_LINK = re.compile(r"(?<!\!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def write_pages() -> None:
    """Write what has changed, so that a second build is quick."""
    pages = {"settings.md": settings.page(), "commands.md": commands.page(), "python.md": api.page()}
    for file, page in COPIES.items():
        pages[page] = relinked((REPOSITORY / file).read_text(encoding="utf-8"), file, GENERATED)
    GENERATED.mkdir(exist_ok=True)
    pages["notebook.md"] = notebook.page(GENERATED)
    for name, text in pages.items():
        path = GENERATED / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def relinked(text: str, file: str, folder: Path) -> str:
    """The text of a file of the repository as a page in `folder`: links lead to pages of the site where there is one,
    and files that are not pages are named instead."""

    def replace(match: re.Match[str]) -> str:
        label, target, fragment = match[1], match[2], match[3] or ""
        linked = os.path.normpath(PurePosixPath(file).parent / target)
        page = DOCS / linked.removeprefix("docs/") if linked.startswith("docs/") else None
        if made := {**COPIES, **MADE}.get(linked):
            page = GENERATED / made
        elif linked == "README.md":
            page = DOCS / "index.md"
        if page is None or page.suffix != ".md":
            return label if label.strip("`") == linked else f"{label} (`{linked}`)"
        return f"[{label}]({Path(os.path.relpath(page, folder)).as_posix()}{fragment})"

    blocks = re.split(r"(^```.*?^```\s*$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(replace, part) for part in blocks)
