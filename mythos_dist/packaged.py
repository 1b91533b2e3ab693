"""Files that come with the package: configs and launch scripts.

In a checkout `configs` and `launch` beside this file are links to the folders of the repository; a wheel has copies.
"""

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
LAUNCH = Path(__file__).parent / "launch"


def packaged_file(path: str | Path, folder: Path) -> Path:
    """`path`, ~/ expanded, if it is a file; else `folder`/`path`.yaml if that is one, for a name such as 1b or
    recipes/sft."""
    path = Path(path).expanduser() if str(path).startswith("~/") else Path(path)
    named = folder / f"{path}.yaml"
    is_name = not path.suffix and not path.is_absolute() and ".." not in path.parts
    return named if is_name and not path.is_file() and named.is_file() else path
