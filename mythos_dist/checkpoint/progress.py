"""Progress bars in bytes; silent when stderr is not a terminal."""

from collections.abc import Callable

from tqdm import tqdm

Progress = Callable[[int], object]  # called with the bytes since the last call, as a bar's `update`


def bar(description: str, total: int | None = None, quiet: bool = False) -> tqdm:
    """A context manager: a bar on stderr of the bytes done, out of `total`."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, disable=True if quiet else None, leave=False)
