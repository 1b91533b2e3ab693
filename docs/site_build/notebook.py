"""A notebook as a page: its text, code and results, as they are stored in the file.

`python docs/site_build/notebook.py` (`make notebook`) runs it and stores new results.
"""

import base64
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "examples" / "train_and_sweep.ipynb"


def page(folder: Path) -> str:
    """The notebook as Markdown; its plots are written into `folder`."""
    parts, plots = [], 0
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if plot := data.get("image/png"):
                plots += 1
                name = f"notebook-{plots}.png"
                (folder / name).write_bytes(base64.b64decode(plot))
                parts.append(f"![Result of the code above]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", []))).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + f"\n\nThe file is `examples/{NOTEBOOK.name}`.\n"


def execute(file: Path) -> Any:
    """Run all cells in the folder of `file`; returns the notebook with its results, without times and versions."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(file, 4)
    where = {"metadata": {"path": str(file.parent)}}
    NotebookClient(book, timeout=900, kernel_name="python3", resources=where, record_timing=False).execute()
    book.metadata["language_info"] = {"name": "python"}
    return book


if __name__ == "__main__":
    import nbformat

    nbformat.write(execute(NOTEBOOK), NOTEBOOK)
