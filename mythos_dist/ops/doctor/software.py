"""Python, the installed packages and what they demand of each other, and whether streaming's reader can be imported.

Demands are read from the packages' own metadata (mosaicml-streaming 0.13.0: numpy < 2.2, transformers < 5), so they
are never out of date here. An unmet one shows late otherwise: when the first shard is read.
"""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from mythos_dist.ops.doctor.lines import Line, note, ok, problem
from mythos_dist.ops.doctor.probe import Outcome

DEMANDING = ("mythos_dist", "deepspeed", "mosaicml-streaming")
SHOWN = ("torch", "deepspeed", "mosaicml-streaming", "numpy", "transformers")


@dataclass(frozen=True)
class Software:
    python: str
    versions: dict[str, str | None]  # of every package below; None: not installed
    demands: dict[str, list[str]]  # of each of DEMANDING that is installed, such as "numpy<2.2"
    reader: Outcome


def find(reader: Outcome) -> Software:
    """`reader`: what the probe `import_reader` found."""
    demands = {name: metadata.requires(name) or [] for name in DEMANDING if _version(name)}
    names = {
        *DEMANDING,
        *SHOWN,
        *(Requirement(demand).name for all_of_one in demands.values() for demand in all_of_one),
    }
    return Software(platform.python_version(), {name: _version(name) for name in names}, demands, reader)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def lines(found: Software) -> Iterator[Line]:
    """Versions, unmet demands, the reader."""
    unmet = list(_unmet(found))
    versions = ", ".join(f"{name} {found.versions[name] or 'missing'}" for name in SHOWN)
    yield ok("python", found.python)
    if unmet:
        yield from unmet
    else:
        yield ok("packages", f"{versions}; what they demand of each other is met")
    if found.reader.timed_out:
        yield note(
            "streaming",
            f"its reader of shards is not yet imported ({found.reader.error})",
            "every rank waits for this when it starts: put the environment on a local disk, or try again",
        )
    elif found.reader.error:
        yield problem(
            "streaming",
            f"its reader of shards cannot be imported ({found.reader.error})",
            "mend what that names",
        )
    else:
        yield ok("streaming", f"its reader of shards can be imported ({found.reader.values['seconds']:.1f} s)")


def _unmet(found: Software) -> Iterator[Line]:
    for name, demands in found.demands.items():
        for demand in map(Requirement, demands):
            if demand.marker and not demand.marker.evaluate({"extra": ""}):
                continue
            version = found.versions[demand.name]
            if version is None or not demand.specifier.contains(version, prereleases=True):
                yield problem(
                    "packages",
                    f"{name} {found.versions[name]} needs {demand.name}{demand.specifier}, and "
                    + (f"{version} is installed" if version else "it is not installed"),
                    f"pip install '{demand.name}{demand.specifier}'",
                )
