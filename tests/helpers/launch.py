"""Ranks for tests: forked from one server that has imported torch, DeepSpeed and streaming, so a launch takes a second.

A rank that exceeds its time limit dumps its stacks and exits; the launch then fails with the output of all ranks.
"""

import contextlib
import faulthandler
import functools
import glob
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import kill_points
from helpers.ports import reserved_port

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the server inherits it: these tests run on CPU and gloo
_CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """Start the process that ranks are forked from. It finds the modules to preload only through PYTHONPATH."""
    _CONTEXT.set_forkserver_preload(["helpers.preload"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [before])])
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@dataclass
class Launch:
    """The results of all ranks: exit codes, return values and output."""

    codes: list[int]
    values: list[Any]
    out: str  # rank 0's standard output
    err: str  # rank 0's standard error
    tails: list[str]  # every rank's last lines of standard error


recent: list[Launch] = []  # launches of the current test, for the report if it fails


def launch(
    world: int,
    program: Callable,
    *arguments: Any,
    seconds: int = 480,
    env: dict[str, str] | None = None,
    grace: float | None = None,
) -> Launch:
    """Run `program(*arguments)` on `world` ranks. A SystemExit becomes the rank's exit code, an exception code 1.

    The environment of a rank is that of this process now, not that of the fork server's start, with `env` added.
    `grace`: seconds after the failure of a rank until the others are killed, as srun and torchrun do.
    `KILL_AFTER` in `env`: a glob pattern; as soon as a file matches it, all ranks are killed at once, and before that
    none of them publishes a later checkpoint. `KILL_IN`: with KILL_AFTER, the seconds from the match to the kill;
    alone, the seconds after which each rank is killed. `KILL_SIGNAL`: see kill_points.py.
    """
    _start_server()
    with reserved_port() as port, tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            variables = {**os.environ, **variables, **(env or {})}
            process = _CONTEXT.Process(
                target=_rank, args=(folder, rank, variables, os.getcwd(), seconds, program, arguments)
            )
            process.start()
            ranks.append(process)
        ended = threading.Event()
        if env and "KILL_AFTER" in env:
            killer = (env["KILL_AFTER"], float(env.get("KILL_IN", 0)), ranks, ended)
            threading.Thread(target=_kill_all, args=killer, daemon=True).start()
        if grace is not None:
            sentinels = {process.sentinel: process for process in ranks}
            while sentinels and not any(process.exitcode for process in ranks):
                for one in multiprocessing.connection.wait(list(sentinels), seconds + 20):
                    sentinels.pop(one)  # pyright: ignore[reportArgumentType]
            deadline = time.monotonic() + grace
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
        for process in ranks:
            process.join(seconds + 20 if grace is None else 0)
            with contextlib.suppress(ProcessLookupError):  # a rank that hangs, and workers of its loader
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
        ended.set()
        files = [Path(folder, str(rank)) for rank in range(world)]
        values = []
        for file in files:
            value = file.with_suffix(".value")
            values.append(_load(value) if value.exists() else None)
        result = Launch(
            [process.exitcode if process.exitcode is not None else -1 for process in ranks],
            values,
            files[0].with_suffix(".out").read_text(),
            files[0].with_suffix(".err").read_text(),
            ["\n".join(file.with_suffix(".err").read_text().splitlines()[-40:]) for file in files],
        )
        recent.append(result)
        return result


def run_ranks(world: int, program: Callable, *arguments: Any, seconds: int = 480) -> list[Any]:
    """Run `program(*arguments)` on each rank of a process group; returns all ranks' values. Fails if a rank fails."""
    result = launch(world, _in_group, program, *arguments, seconds=seconds)
    failed = "".join(f"\nrank {i}:\n{tail}" for i, tail in enumerate(result.tails) if result.codes[i])
    assert not any(result.codes), f"exit codes {result.codes}{failed}"
    return result.values


def train(
    world: int, *arguments: str, seconds: int = 480, env: dict[str, str] | None = None, grace: float | None = None
) -> Launch:
    """`python -m mythos_dist.train ARGUMENTS` on `world` ranks."""
    return launch(world, train_here, list(arguments), seconds=seconds, env=env, grace=grace)


def run_tool(path: Path, *arguments: object) -> Launch:
    """`python PATH ARGUMENTS` in a forked rank, which saves the seconds of its imports."""
    return launch(1, _run_program, str(path), [str(argument) for argument in arguments])


def run_command(line: str) -> Launch:
    """A line `mythos COMMAND ...` of a shell in a forked rank, which saves the seconds of its imports. The command sees
    no launcher, and one thread per process."""
    program, *words = shlex.split(line, comments=True)
    assert program == "mythos", line
    return launch(1, _run_mythos, words)


def _run_mythos(words: list[str]) -> None:
    from mythos_dist.commands.main import main

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    sys.argv = ["mythos", *words]
    main()


def _run_program(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def in_folder_of_rank(parent: str, arguments: Sequence[str]) -> None:
    """Train with `parent`/RANK as working directory: a file system that differs between ranks."""
    folder = Path(parent, os.environ["RANK"])
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    train_here(arguments)


def train_here(arguments: Sequence[str]) -> None:
    """`python -m mythos_dist.train ARGUMENTS` in this process, for programs of ranks; raises SystemExit."""
    from mythos_dist.train.__main__ import main

    _allow_fp16()
    sys.argv = ["mythos_dist.train", *arguments]
    main()


def train_until_rolled_back(arguments: Sequence[str]) -> None:
    """Train with ranks that are killed at the end of a rollback."""
    from mythos_dist.train.loop import Run

    roll_back = Run.roll_back

    def roll_back_and_die(self: Run) -> None:
        roll_back(self)
        os.kill(os.getpid(), signal.SIGKILL)

    Run.roll_back = roll_back_and_die
    train_here(arguments)


def _allow_fp16() -> None:
    """On every CPU, as torch does; DeepSpeed refuses it on CPUs without native fp16."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: True


def _in_group(program: Callable, *arguments: Any) -> Any:
    import torch.distributed as dist

    from mythos_dist.parallel.process import join_process_group

    join_process_group()
    _allow_fp16()
    value = program(*arguments)
    dist.destroy_process_group()
    return value


def new_process_groups(name: str) -> None:
    """Destroy all process groups of this rank and join a new one; every rank calls it with the same new name.

    For programs that test many layouts in one launch. The threads of a gloo group wake up a hundred times a second, and
    those of fifteen layouts took two thirds of the CPU time. They end when nothing refers to the group any more, and
    engines are parts of cycles: the caller deletes its own, and they are collected here.
    """
    import gc

    import deepspeed.comm
    import torch.distributed as dist

    from mythos_dist.parallel.process import join_process_group

    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    deepspeed.comm.destroy_process_group()
    gc.collect()
    join_process_group(dist.PrefixStore(name, store))


def _rank(folder: str, rank: int, variables: dict, cwd: str, seconds: int, program: Callable, arguments: tuple) -> None:
    import torch

    os.setpgrp()
    multiprocessing.set_start_method("fork", force=True)  # as under a real launcher: loader workers fork
    os.chdir(cwd)
    for name in os.environ.keys() - variables.keys() - {"PYTHONPATH"}:  # the server's PYTHONPATH has the tests
        del os.environ[name]
    os.environ.update({name: str(value) for name, value in variables.items() if name != "PYTHONPATH"})
    torch.set_num_threads(1)
    if "KILL_AFTER" in os.environ:
        _hold(os.environ["KILL_AFTER"])
    if os.environ.get("FAIL_AT", "").startswith(f"{rank}:"):
        _fail_at(int(os.environ["FAIL_AT"].partition(":")[2]))
    if "KILL_POINTS_IN" in os.environ:
        kill_points.install()
    if "SLOW_SAVE" in os.environ:
        _save_slowly(float(os.environ["SLOW_SAVE"]))
    file = Path(folder, str(rank))
    with file.with_suffix(".out").open("w") as out, file.with_suffix(".err").open("w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)  # as Python opens it
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.stderr)
        if "KILL_IN" in os.environ and "KILL_AFTER" not in os.environ:
            timer = threading.Timer(float(os.environ["KILL_IN"]), kill_points.send_signal)
            timer.daemon = True  # a program that ends before
            timer.start()
        code = _run(program, arguments, file.with_suffix(".value"))
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # no interpreter shutdown: gloo's threads of a failed rank would wait for its peers


def _run(program: Callable, arguments: tuple, file: Path) -> int:
    """Run the program of a rank and write its value to `file`. Returns the exit code."""
    import torch

    ended, value = False, None
    try:
        value = program(*arguments)
        ended = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        if not ended:  # else it is a Ctrl-C that came too late for the program
            traceback.print_exc()
            return 1
    torch.save(value, file)
    return 0


def _kill_all(pattern: str, seconds: float, ranks: Sequence[Any], ended: threading.Event) -> None:
    """SIGKILL all ranks as soon as a file matches: without handlers or cleanup, like a power failure.

    They are suspended first, so that none of them detects that another one has exited and exits by itself.
    """
    while not glob.glob(pattern):
        if ended.wait(0.002):
            return
    ended.wait(seconds)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _hold(pattern: str) -> None:
    """Rank 0 waits before and after it publishes a checkpoint if a file matches, and the others wait for rank 0, so
    that the run cannot complete before it is killed."""
    from mythos_dist.checkpoint import save

    publish = save.publish

    def wait_if_killed() -> None:
        while glob.glob(pattern):
            time.sleep(0.01)

    def held(*arguments: Any) -> Path:
        wait_if_killed()
        folder = publish(*arguments)
        wait_if_killed()
        return folder

    save.publish = held


def _fail_at(step: int) -> None:
    """This rank raises an unexpected error when it begins a step."""
    from mythos_dist.ops.cluster.inject import FaultInjector

    failing = step

    def fail(self: FaultInjector, step: int) -> None:
        if step == failing:
            raise ZeroDivisionError("injected error")

    FaultInjector.before_step = fail


def _save_slowly(seconds: float) -> None:
    """Make writing each tensor of a checkpoint take `seconds` longer."""
    from mythos_dist.checkpoint import save

    write = save.write_tensors

    def slowly(file: Path, shapes: dict, blocks: Iterable, **options: Any) -> tuple[int, str]:
        return write(file, shapes, (time.sleep(seconds) or block for block in blocks), **options)

    save.write_tensors = slowly


def _load(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True)
