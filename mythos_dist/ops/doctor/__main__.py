"""Is this machine ready for training, and what would a config use here? Starts nothing and leaves nothing behind.

Exit code 0: no problem. 1: problems, and what to do about each. 2: the config itself is wrong.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict

from mythos_dist import __version__
from mythos_dist.config.arguments import add_config, parse_arguments
from mythos_dist.config.layout import layout_problems
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError, exit_with, run_command
from mythos_dist.ops.doctor import gpu, kernels, launcher, memory, network, probe, software, storage
from mythos_dist.ops.doctor.lines import Line, examine, ok, problem
from mythos_dist.units import count


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mythos_dist.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_config(parser, "a YAML file; without one only the machine is looked at", optional=True)
    add("--json", action="store_true", help="print everything as JSON")
    return parse_arguments(parser)


def main() -> None:
    """Look, report; see the top of this file for exit codes."""
    arguments = parse()
    try:
        if arguments.overrides and not arguments.config:
            raise UserError(f"{arguments.overrides[0]} needs a config file before it, such as configs/1b.yaml")
        config = load_config(arguments.config, arguments.overrides) if arguments.config else None
        # Libraries print and warn while they are imported; what matters of it is in the lines.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = examine("doctor", lambda: diagnose(config))
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    counts = {status: sum(line.status == status for line in found) for status in ("problem", "note")}
    about = {"version": __version__, "host": socket.gethostname(), "config": arguments.config}
    if arguments.json:
        told = {"problems": counts["problem"], "notes": counts["note"], "lines": [asdict(line) for line in found]}
        print(json.dumps(about | told))
    else:
        print(f"mythos_dist {__version__} on {about['host']}" + (f", {arguments.config}" if config else ""))
        print("\n".join(shown(found)))
        print(f"{count(counts['problem'], 'problem')}, {count(counts['note'], 'note')}")
    sys.exit(1 if counts["problem"] else 0)


def shown(found: Iterable[Line]) -> list[str]:
    """For a person: a line each, and what to do below it."""
    width = max(len(line.topic) for line in found)
    texts = []
    for line in found:
        texts.append(f"  {line.status:<7}  {line.topic:<{width}}  {line.text}")
        if line.remedy:
            texts.append(f"  {'':7}  {'':{width}}  -> {line.remedy}")
    return texts


def diagnose(config: Config | None) -> list[Line]:
    """All lines about this machine, and with a config about what it would use here."""
    with contextlib.suppress(Exception):  # if it fails, every check that needs it says why
        import torch  # noqa: F401  # the probes have it from here
    # They run while the rest is looked at.
    joined, reader, names = (probe.Probe(look) for look in (probe.join_group, probe.import_reader, probe.look_up))
    env = dict(os.environ)
    gpus = functools.cache(lambda: gpu.find(env.get("CUDA_VISIBLE_DEVICES")))
    parts = functools.cache(lambda: kernels.find(config))
    links = functools.cache(lambda: network.find(len(gpus().usable), joined.outcome(), names.outcome(), env))
    room = functools.cache(lambda: memory.find(bool(links().ports), len(gpus().usable)))
    checks: dict[str, Callable[[], Iterable[Line]]] = {
        "GPU": lambda: gpu.lines(gpus()),
        "kernels": lambda: kernels.lines(parts(), gpus()),
        "network": lambda: network.lines(links()),
        "launcher": lambda: launcher.lines(launcher.find(env, len(gpus().usable))),
        "memory": lambda: memory.lines(room()),
    }
    if config:
        checks |= {
            "kernels of the config": lambda: kernels.choices(config, parts(), gpus()),
            "layout": lambda: layout(config, env),
            "folders": lambda: storage.lines(storage.find(config), config, room().available, launcher.machines(env)),
        }
    found = [line for topic, check in checks.items() for line in examine(topic, check)]
    # Last, because it waits for the slowest probe; told first.
    return examine("packages", lambda: software.lines(software.find(reader.outcome()))) + found


def layout(config: Config, env: dict[str, str]) -> Iterable[Line]:
    """Whether the ranks that a launcher has started make whole replicas; without one, how many it takes."""
    parallel = config.parallel
    replica = parallel.pipe * parallel.tensor
    world = env.get("WORLD_SIZE", "")
    if not world.isdecimal():
        ranks = replica * parallel.expert
        yield ok("layout", f"runs on {'any number of ranks' if ranks == 1 else f'any multiple of {ranks} ranks'}")
        return
    for text in layout_problems(config, int(world)):
        said, _, remedy = text.partition("; ")
        yield problem("layout", said, remedy)
    if not layout_problems(config, int(world)):
        yield ok("layout", f"{count(int(world), 'rank')} make {count(int(world) // replica, 'replica')} of {replica}")


if __name__ == "__main__":
    run_command(main)
