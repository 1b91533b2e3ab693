"""The documentation site: Sphinx reads the Markdown of this folder and what docs/site_build makes of the code.

    make docs      # site/index.html; any warning is an error, and so is a link that leads nowhere

Decisions: PROJECT-9.
"""

import inspect
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from site_build import api, links, pages  # noqa: E402

import mythos_dist  # noqa: E402

project = "mythos_dist"
version = release = mythos_dist.__version__
copyright = "the authors of mythos_dist"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["site_build"]
default_role = "code"  # docstrings are written as Markdown: `name` is code
highlight_language = "none"
pygments_style, pygments_dark_style = "friendly", "github-dark"

myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
add_module_names = False

html_theme = "furo"
html_title = "mythos_dist"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["site.css"]


def _inline_math(self: Any, node: Any) -> None:
    self.body.append(tex2mathml(node.astext()))
    raise SkipNode


def _block_math(self: Any, node: Any) -> None:
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def _relink(app: Sphinx, page: str, source: list[str]) -> None:
    """Pages of docs/ link to files of the repository as GitHub shows them."""
    if not page.startswith("reference/"):
        source[0] = pages.relinked(source[0], f"docs/{page}.md", HERE)


def _describe_arguments(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    if callable(value):
        parameters = inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters
        api.describe_arguments(lines, set(parameters))


def _check_links(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html" and (problems := links.problems(Path(app.outdir))):
        raise SphinxError(f"{len(problems)} bad links\n" + "\n".join(problems))


def setup(app: Sphinx) -> None:
    """Write the generated pages, and register what Sphinx does not have: math without a network, strict links."""
    pages.write_pages()
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    app.connect("source-read", _relink)
    app.connect("autodoc-process-docstring", _describe_arguments)
    app.connect("build-finished", _check_links)
