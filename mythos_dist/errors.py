"""One exception for the user's own mistakes: printed without a traceback, exit code 2.

Everything that a user can get wrong (a config, a folder, a token file) raises `UserError`; `report` prints it.
Slips of our own stay `assert` and keep their traceback.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """One or more problems, each a line that names the thing, shows its value and says what to do."""

    def __init__(self, problems: str | Sequence[str], source: str = ""):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source  # what was being read: a file, a folder; may be empty
        where = f"{source}: " if source else ""
        if len(self.problems) == 1:
            super().__init__(where + self.problems[0])
        else:
            super().__init__(f"{where}{len(self.problems)} problems\n" + "\n".join(f"  {p}" for p in self.problems))


def exit_with(error: UserError) -> NoReturn:
    """Print the problems on standard error and leave with exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
