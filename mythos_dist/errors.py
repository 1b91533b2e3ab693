"""One exception for the user's own mistakes: printed without a traceback, exit code 2. And all exit codes.

Everything that a user can get wrong (a config, a folder, a token file) raises `UserError`; `exit_with` prints it.
Slips of our own stay `assert` and keep their traceback.
"""

import atexit
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

# What a launch script decides by; 0 is done, and whatever is not here is a fault.
EXIT_USER_ERROR = 2  # the user has to mend something: starting again is of no use
EXIT_BAD_NODE = 3  # a node is unfit, others are not: start again without it
EXIT_LOST_RANK = 4  # a rank hung or vanished: start again
EXIT_DIVERGED = 5  # the numbers went wrong again and again: starting again is of no use
EXIT_STOPPED = 85  # stopped on a signal, or at the end of the time, behind a checkpoint: start again
EXIT_INTERRUPTED = 130  # Ctrl-C where there is nothing to save, or a second one; what a shell makes of SIGINT


class UserError(ValueError):
    """One or more problems, each a line that names the thing, shows its value and says what to do."""

    exit_code = EXIT_USER_ERROR
    only_this_rank = False  # True: no other rank knows of it, so this one has to say it

    def __init__(self, problems: str | Sequence[str], source: str = ""):
        self.problems = [redact(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        self.source = source = redact(source)  # what was being read: a file, a folder; may be empty
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


class LostRankError(UserError):
    """A rank did not come, or cannot be reached: another start may find it."""

    exit_code = EXIT_LOST_RANK


class DivergedError(UserError):
    """Gradients stay useless whatever is skipped; a person has to look at it."""

    exit_code = EXIT_DIVERGED


_SECRET = (  # names of parameters, of signed URLs and others, whose values give access
    r"x-(?:amz|goog|oss|cos|ms)-[\w-]+|sig|signature|token|password|passwd|pwd|secret|credentials?|authorization"
    r"|(?:access|auth|refresh|session|sas|id|api|hf)[-_]?token|(?:access|api|account|client|secret)[-_]?(?:key|secret)"
    r"|(?:aws)?accesskeyid|(?:aws)?secretaccesskey|googleaccessid|key-pair-id"
)
# Bounded repeats and the look behind keep the search linear, whatever a message holds.
_URL = r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]{0,30}://)"
_USER = re.compile(_URL + r"(?:[^\s/?#'\"]{1,400}|[^\s/?#:'\"]{0,99}:(?!\d{1,5}/)[^\s'\":]{0,400})@", re.IGNORECASE)
_QUERY = re.compile(r"(?<![a-z0-9+.-])(https?://[^\s?#'\"<>]*)[?#][^\s'\"<>)]*", re.IGNORECASE)
_PARAMETER = re.compile(rf"(?<![\w.-])({_SECRET})(=|%3D|['\"]: ?['\"])(?!\*\*\*)[^\s&'\"<>,;)]+", re.IGNORECASE)
_TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_|glpat-|AKIA|ASIA)[A-Za-z0-9_-]{8,}|\b(Bearer|Basic) [\w.~+/=-]{8,}")


def redact(text: str) -> str:
    """`text` without what gives access: user names and passwords in URLs, queries of web addresses (a signed URL is a
    password), values of parameters that are named like secrets, and access tokens.

    Messages of network libraries repeat the URL that they were given, so every UserError passes here.
    """
    text = _TOKEN.sub(lambda match: f"{match[1] or match[2] + ' '}***", text)
    text = _QUERY.sub(r"\1?***", _USER.sub(_without_user, text))
    return _PARAMETER.sub(r"\1\2***", text)


def _without_user(match: re.Match[str]) -> str:
    """abfs://container@account is no secret."""
    user = match[0].removeprefix(match[1])
    return f"{match[1]}***@" if ":" in user or match[1].lower() in ("http://", "https://", "ftp://") else match[0]


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error).splitlines() or ["no message"])[0]


def exit_with(error: UserError) -> NoReturn:
    """Print the problems on standard error and leave with the error's exit code."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def run_command(main: Callable[[], object], is_tool: bool = True) -> None:
    """Run a program's `main` so that a mistake is a message with exit code 2, and Ctrl-C one line with exit code 130.

    is_tool: a file that cannot be read or written, and too little memory, count as mistakes of the user too. Training
    says no: a launcher would not start it again after exit code 2.

    Ctrl-C raises KeyboardInterrupt in `main`, whose `finally` blocks clean up. Libraries may turn that into an error
    of theirs while they are imported or wait for worker processes, so whatever leaves `main` after it counts as it.
    They may also drop it, as torch does while it imports numpy and Python in `__del__`: it is raised again each half
    second until something handles it.
    """
    interrupted: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        interrupted.append(number)
        signal.signal(signal.SIGALRM, interrupt_again)
        signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
        raise KeyboardInterrupt

    def interrupt_again(number: int, frame: Any) -> None:
        if sys.exc_info()[0] is None:  # of what the signal came between: no `except` or `finally` is under way
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before == signal.default_int_handler:  # a script's background job ignores it
        signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == EXIT_INTERRUPTED:
            raise  # `main` has said what there is to say
        if interrupted or isinstance(error, KeyboardInterrupt):
            _leave_interrupted()
        if isinstance(error, UserError):
            exit_with(error)
        if is_tool and isinstance(error, OSError) and error.filename is not None:
            exit_with(UserError(f"cannot be used ({error.strerror}); name another, or fix that", str(error.filename)))
        if is_tool and isinstance(error, MemoryError):
            exit_with(UserError(f"there is not enough memory ({first_line(error)}); ask for less"))
        raise
    finally:
        if interrupted:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if signal.getsignal(signal.SIGINT) == interrupt:
            signal.signal(signal.SIGINT, before)


def _leave_interrupted() -> NoReturn:
    """Not by way of the interpreter's own end, which waits for threads: what they have not finished has no name yet."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends this as well, without a word
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print("\nstopped by Ctrl-C", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()  # temporary folders, worker processes
    os._exit(EXIT_INTERRUPTED)


def report_to_launcher(code: int, nodes: Sequence[str] = ()) -> None:
    """Leave the exit code, and host names of unfit nodes, in the files that a launch script has named.

    When ranks leave one after the other, srun kills the later ones and returns what became of those.
    """
    for name, lines in {"MYTHOS_VERDICT": [str(code)], "MYTHOS_BAD_NODES": nodes}.items():
        if lines and (file := os.environ.get(name)):
            with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as stream:
                stream.write("".join(f"{line}\n" for line in lines))
