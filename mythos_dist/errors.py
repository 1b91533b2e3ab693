"""User errors, printed without a traceback, and all exit codes.

Everything that a user can get wrong (a config, a folder, a token file) raises `UserError`; `exit_with` prints it.
Bugs stay `assert` and keep their traceback.

Decisions: CLUSTER-12.
"""

import atexit
import contextlib
import errno
import io
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

# Launch scripts decide by these whether to restart. 0: done; any other code is a bug.
EXIT_USER_ERROR = 2  # configuration or input error: do not restart
EXIT_BAD_NODE = 3  # a node is unfit: restart without it
EXIT_LOST_RANK = 4  # a rank hung or was lost: restart
EXIT_DIVERGED = 5  # the loss diverged repeatedly: do not restart
EXIT_STOPPED = 85  # stopped early (signal, run.max_seconds, STOP) after saving a checkpoint: restart
EXIT_BROKEN_PIPE = 141  # of a tool whose output is read no further; the shell's code for SIGPIPE
EXIT_INTERRUPTED = 130  # Ctrl-C with nothing to save, or a second Ctrl-C; the shell's code for SIGINT


class UserError(ValueError):
    """One or more problems, one per line; each names the setting, shows its value and says what to do.

    >>> from mythos_dist import UserError, load_config
    >>> try:
    ...     load_config("configs/tiny_cpu.yaml", ["model.dimm=3", "train.steps=0"])
    ... except UserError as error:
    ...     print(*error.problems, sep="\\n")
    model.dimm: unknown key; did you mean model.dim?
    train.steps=0 must be at least 1
    """

    exit_code = EXIT_USER_ERROR
    only_this_rank = False  # True: perhaps not on rank 0, so one rank of each node prints it

    def __init__(self, problems: str | Sequence[str], source: str = ""):
        given = [problems] if isinstance(problems, str) else problems
        self.problems = [redact(problem).translate(_CONTROLS) for problem in given]
        # What was being read: a file, a folder; may be empty. In a name, a line end is escaped as well.
        self.source = source = redact(source).translate(_CONTROLS | _LINE_ENDS)
        where = f"{source}: " if source else ""
        if len(self.problems) == 1:
            super().__init__(where + self.problems[0])
        else:
            super().__init__(f"{where}{len(self.problems)} problems\n" + "\n".join(f"  {p}" for p in self.problems))


class NodeError(UserError):
    """Some nodes of a run are unfit; the run can continue without them."""

    exit_code = EXIT_BAD_NODE

    def __init__(self, problems: str | Sequence[str], nodes: Sequence[str]):
        """`nodes`: host names of the unfit nodes."""
        super().__init__(problems)
        self.nodes = list(nodes)


class LostRankError(UserError):
    """A rank did not start, or cannot be reached; a restart may succeed."""

    exit_code = EXIT_LOST_RANK


class DivergedError(UserError):
    """Gradients stay non-finite or too large although steps were skipped; a restart does not help."""

    exit_code = EXIT_DIVERGED


_SECRET = (  # names of parameters, in signed URLs and elsewhere, whose values give access
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


# Names of files may hold control characters, which a terminal would obey: they are escaped in messages.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_LINE_ENDS = {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}


def redact(text: str) -> str:
    """`text` without what gives access: user names and passwords in URLs, queries of web addresses (a signed URL is a
    password), values of parameters that are named like secrets, and access tokens.

    Messages of network libraries repeat the URL that they were given, so every UserError passes here.
    """
    text = _TOKEN.sub(lambda match: f"{match[1] or match[2] + ' '}***", text)
    text = _QUERY.sub(r"\1?***", _USER.sub(_without_user, text))
    return _PARAMETER.sub(r"\1\2***", text)


def _without_user(match: re.Match[str]) -> str:
    """abfs://container@account is not a secret."""
    user = match[0].removeprefix(match[1])
    return f"{match[1]}***@" if ":" in user or match[1].lower() in ("http://", "https://", "ftp://") else match[0]


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or ["no message"])[0]


def exit_with(error: UserError) -> NoReturn:
    """Print the problems on standard error and exit with the error's code."""
    with contextlib.suppress(OSError, ValueError):  # a full disk, a closed terminal
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


SPIN_COUNT = "2000"  # rounds of a thread that waits for another one, some 30 us


def run_command(main: Callable[[], object], is_tool: bool = True) -> None:
    """Run a program's `main`: a user error is a message and exit code 2, Ctrl-C is one line and exit code 130.

    is_tool: a file that cannot be read or written, and too little memory, are user errors as well. Not for training: a
    launcher does not restart it after exit code 2. Training always ends by `exit_now`.

    Ctrl-C raises KeyboardInterrupt in `main`, whose `finally` blocks clean up. Libraries may turn that into their own
    error while they are imported or wait for worker processes, so after Ctrl-C any exception counts as an interrupt.
    They may also drop it, as torch does while it imports numpy, and Python does in `__del__`: it is raised again every
    half second until `main` ends. While torch is imported, whose C++ functions may abort the process instead, the
    program ends then.

    Threads of OpenMP, which torch uses on a CPU, soon sleep while they wait, unless the environment says how long they
    spin (PROJECT-13).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read once, when torch is imported
    if is_tool:
        _run_main(main, is_tool)
        return
    code = 0
    try:
        _run_main(main, is_tool)
    except BaseException as error:
        code = _exit_code(error)
    exit_now(code)


def _run_main(main: Callable[[], object], is_tool: bool) -> None:
    interrupted: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        if _delays:
            _delays[-1] = True
            return
        interrupted.append(number)
        signal.signal(signal.SIGALRM, interrupt_again)
        signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
        raise KeyboardInterrupt

    def interrupt_again(number: int, frame: Any) -> None:
        if _torch_is_imported_now():
            _leave_interrupted()
        if sys.exc_info()[0] is None:  # no `except` or `finally` block is running
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before == signal.default_int_handler:  # a background job of a script ignores SIGINT
        signal.signal(signal.SIGINT, interrupt)
    if is_tool and isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        try:
            main()
        finally:
            if is_tool and sys.stdout:
                sys.stdout.flush()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == EXIT_INTERRUPTED:
            raise  # `main` has printed its own message
        if interrupted or isinstance(error, KeyboardInterrupt):
            _leave_interrupted()
        _exit_with_message(error, is_tool)
        raise
    finally:
        if interrupted:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) == interrupt:
            signal.signal(signal.SIGINT, before)


def _exit_with_message(error: BaseException, is_tool: bool) -> None:
    """Exit if the error needs no traceback: one of the user or, of a tool, of a file, its output or its memory."""
    if isinstance(error, UserError):
        exit_with(error)
    if is_tool and isinstance(error, OSError) and error.filename is not None:
        exit_with(UserError(f"cannot be used ({error.strerror}); name another, or fix that", str(error.filename)))
    if is_tool and isinstance(error, OSError) and _is_of_stdout(error):
        _exit_without_output(error)
    if is_tool and isinstance(error, MemoryError):
        exit_with(UserError(f"there is not enough memory ({first_line(error)}); ask for less"))


_delays: list[bool] = []  # of `delaying_interrupts` that have not ended: whether Ctrl-C was pressed in them


@contextlib.contextmanager
def delaying_interrupts() -> Iterator[None]:
    """Ctrl-C in the block has its effect after it, under `run_command`: for renames that belong together."""
    _delays.append(False)
    try:
        yield
    finally:
        if _delays.pop():
            signal.raise_signal(signal.SIGINT)


def _torch_is_imported_now() -> bool:
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _exit_code(error: BaseException) -> int:
    """The exit code that Python gives for an exception that nothing catches; prints what Python prints."""
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _is_of_stdout(error: OSError) -> bool:
    """Whether standard output cannot be written. An error of `write` names no file, and pipes to workers break, too."""
    if error.errno == errno.EPIPE:
        poll = select.poll()
        poll.register(1, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    if error.errno not in (errno.ENOSPC, errno.EIO):
        return False
    try:
        os.write(1, b"\n")
    except OSError:
        return True
    return False


def _exit_without_output(error: OSError) -> NoReturn:
    """Standard output cannot be written: its reader has ended (`tool | head`), or it is a file on a full disk."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes it once more
    if error.errno == errno.EPIPE:
        sys.exit(EXIT_BROKEN_PIPE)
    exit_with(UserError(f"cannot be written ({error.strerror})", "standard output"))


def exit_now(code: int) -> NoReturn:
    """Exit without the interpreter's shutdown, but remove temporary folders and end worker processes (`atexit`).

    The shutdown waits for threads; their unfinished files have temporary names. And it ends a daemon thread as soon as
    it returns from a C++ function of torch, which aborts the process: exit code 134 instead of `code`.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # None: it was closed before the start
            stream.flush()
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    os._exit(code)


def end_with(parent: int) -> None:
    """Start a thread that ends this process within a second after the process `parent`, whatever it waits for then."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent process", daemon=True).start()


def _leave_interrupted() -> NoReturn:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C ends the process at once
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print("\nstopped by Ctrl-C", file=sys.stderr, flush=True)
    exit_now(EXIT_INTERRUPTED)


def report_to_launcher(code: int, nodes: Sequence[str] = ()) -> None:
    """Write the exit code, and host names of unfit nodes, to the files that the launch script has named.

    When ranks exit one after another, srun kills the later ones and returns their exit status instead.
    """
    for name, lines in {"MYTHOS_VERDICT": [str(code)], "MYTHOS_BAD_NODES": nodes}.items():
        if lines and (file := os.environ.get(name)):
            with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as stream:
                stream.write("".join(f"{line}\n" for line in lines))
