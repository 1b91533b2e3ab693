"""How far long work on checkpoints is: a bar to a person, nothing where nobody watches."""

from collections.abc import Callable

from tqdm import tqdm

Progress = Callable[[int], object]  # bytes since the last call; a bar's `update` is one


def bar(what: str, total: int | None = None, quiet: bool = False) -> tqdm:
    """A context: bytes done of `total`, on standard error."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=True if quiet else None, leave=False)
