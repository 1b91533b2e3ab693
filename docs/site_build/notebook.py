"""A notebook as a page: its text, code and results, as they are stored in the file."""

import base64
import json
from pathlib import Path

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
