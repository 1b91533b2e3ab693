"""One exception for the user's own mistakes: printed without a traceback, exit code 2. And all exit codes.

Everything that a user can get wrong (a config, a folder, a token file) raises `UserError`; `exit_with` prints it.
Slips of our own stay `assert` and keep their traceback.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

# What a launch script decides by; 0 is done, and whatever is not here is a fault.
EXIT_USER_ERROR = 2  # the user has to mend something: starting again is of no use
EXIT_BAD_NODE = 3  # a node is unfit, others are not: start again without it
EXIT_LOST = 4  # a rank hung or vanished: start again
EXIT_DIVERGED = 5  # the numbers went wrong again and again: starting again is of no use
EXIT_STOPPED = 85  # stopped on a signal, or at the end of the time, behind a checkpoint: start again


class UserError(ValueError):
    """One or more problems, each a line that names the thing, shows its value and says what to do."""

    exit_code = EXIT_USER_ERROR
    alone = False  # True: no other rank knows of it, so this one has to say it

    def __init__(self, problems: str | Sequence[str], source: str = ""):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source  # what was being read: a file, a folder; may be empty
        where = f"{source}: " if source else ""
        if len(self.problems) == 1:
            super().__init__(where + self.problems[0])
        else:
            super().__init__(f"{where}{len(self.problems)} problems\n" + "\n".join(f"  {p}" for p in self.problems))


class NodeError(UserError):
    """What some nodes of a run have and others have not, so that it would train without them."""

    exit_code = EXIT_BAD_NODE

    def __init__(self, problems: str | Sequence[str], nodes: Sequence[str]):
        """`nodes`: the host names of those that are unfit."""
        super().__init__(problems)
        self.nodes = list(nodes)


class DivergedError(UserError):
    """Gradients stay useless whatever is skipped; a person has to look at it."""

    exit_code = EXIT_DIVERGED


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error).splitlines() or ["no message"])[0]


def exit_with(error: UserError) -> NoReturn:
    """Print the problems on standard error and leave with the error's exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


@contextlib.contextmanager
def mistakes_end() -> Iterator[None]:
    """Around the work of a command: a mistake of the user ends it with a message and its exit code, Ctrl-C with 130.

    A file or folder that cannot be read or written, and more memory than there is, are such mistakes as well.
    """
    try:
        yield
    except UserError as error:
        exit_with(error)
    except OSError as error:
        if error.filename is None:
            raise
        exit_with(UserError(f"cannot be used ({error.strerror}); name another, or fix that", str(error.filename)))
    except MemoryError as error:
        exit_with(UserError(f"there is not enough memory ({first_line(error)}); ask for less"))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)


def tell_launcher(code: int, nodes: Sequence[str] = ()) -> None:
    """Leave the exit code, and host names of unfit nodes, in the files that a launch script has named.

    When ranks leave one after the other, srun kills the later ones and returns what became of those.
    """
    for name, lines in {"MYTHOS_VERDICT": [str(code)], "MYTHOS_BAD_NODES": nodes}.items():
        if lines and (file := os.environ.get(name)):
            with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as stream:
                stream.write("".join(f"{line}\n" for line in lines))
