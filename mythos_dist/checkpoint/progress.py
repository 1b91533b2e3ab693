"""Progress bars with rate and time left; silent when stderr is not a terminal."""

from collections.abc import Callable

from tqdm import tqdm

Progress = Callable[[int], object]  # called with the bytes since the last call, as a bar's `update`


def bar(description: str, total: int | None = None, quiet: bool = False, unit: str = "B") -> tqdm:
    """A context manager: a bar on stderr of the bytes, or other units, done, out of `total`."""
    hidden = True if quiet else None  # None: unless stderr is a terminal
    return tqdm(total=total, desc=description, unit=unit, unit_scale=unit == "B", disable=hidden, leave=False)
