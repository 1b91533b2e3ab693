"""Sources of the GPU packages: fetched by pip, checked against pinned hashes, unpacked, and made to build.

Each fix is a text that must be found an exact number of times; another number means another release, and building it
on a guess would fail an hour later or, worse, not at all. Prints the folder of each package's source.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mythos_dist.errors import UserError, run_command

PINS = Path(__file__).with_name("gpu_packages.txt")


@dataclass(frozen=True)
class Pin:
    """One line of gpu_packages.txt."""

    name: str
    version: str
    sha256: str
    line: str

    @property
    def folder(self) -> str:
        """What the archive unpacks to; without ".tar.gz" it is the archive's name too."""
        return f"{self.name.replace('-', '_')}-{self.version}"


@dataclass(frozen=True)
class Fix:
    """`old` stands `times` times in `file` and becomes `new`."""

    file: str
    old: str
    new: str
    times: int
    why: str


_STANDARD = "torch's headers want C++20 (from torch 2.14)"
_PIN = "the pin would drag torch, numpy or packaging down; it is a caution, not a need"
FIXES: dict[str, list[Fix]] = {
    "stanford-stk": [],
    "grouped_gemm": [Fix("setup.py", '"-std=c++17"', '"-std=c++20"', 1, _STANDARD)],
    "megablocks": [
        Fix(
            "csrc/cumsum.h",
            "stream,\n\t\t\t\t\t    debug_synchronous));",
            "stream));",
            2,
            "CUB dropped the argument debug_synchronous (databricks/megablocks#180)",
        ),
        Fix("setup.py", "'torch>=2.7.0,<2.7.1'", "'torch>=2.7.0'", 1, _PIN),
        Fix("setup.py", "'numpy>=1.21.5,<2.1.0'", "'numpy>=1.21.5'", 1, _PIN),
        Fix("setup.py", "'packaging>=21.3.0,<24.2'", "'packaging>=21.3.0'", 1, _PIN),
    ],
    "flash-attn": [Fix("setup.py", '"-std=c++17"', '"-std=c++20"', 4, _STANDARD)],
}


def pins() -> dict[str, Pin]:
    """All pinned packages by name, in the order in which they are built."""
    pattern = re.compile(r"^([\w-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$", re.MULTILINE)
    return {match[1]: Pin(match[1], match[2], match[3], match[0]) for match in pattern.finditer(PINS.read_text())}


def fetch(pin: Pin, folder: Path) -> Path:
    """The unpacked source under `folder`, as published; downloaded unless it is there. UserError if that fails."""
    source = folder / pin.folder
    if source.is_dir():
        return source
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        archive = _download(pin, Path(work))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != pin.sha256:
            raise UserError(f"{archive.name} has sha256 {found}, not {pin.sha256}; it is not the release that we know")
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        try:
            Path(work, pin.folder).rename(source)
        except OSError:  # another process was faster
            if not source.is_dir():
                raise
    return source


def _download(pin: Pin, folder: Path) -> Path:
    """The archive, by pip, so that mirrors and proxies are those of the person's configuration.

    pip also runs the package's setup.py to learn its name. These import torch and ask for a GPU or a CUDA folder,
    unless the environment answers first; nothing is compiled.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(pin.line + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "--retries", "1", "--timeout", "30"]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    answers = {"TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": "/usr/local/cuda", "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    done = subprocess.run(command, env=os.environ | answers, capture_output=True, text=True)
    archive = folder / f"{pin.folder}.tar.gz"
    if not archive.exists():
        said = (done.stdout + done.stderr).strip().splitlines() or [f"pip left with {done.returncode}"]
        reason = "; ".join([line.strip() for line in said if "rror:" in line.lower()][-3:] or said[-1:])
        raise UserError(f"{pin.name}=={pin.version} cannot be downloaded: {reason}; see `pip config list`")
    return archive


def patch(pin: Pin, source: Path) -> list[str]:
    """Apply the package's fixes to `source`; a line for each. What is fixed stays as it is.

    UserError, with all problems and nothing changed, if a text is not there as often as it should be.
    """
    problems, lines, texts = [], [], {}
    for fix in FIXES[pin.name]:
        path = source / fix.file
        if path not in texts:
            texts[path] = path.read_text() if path.exists() else ""
        before, after = texts[path].count(fix.old), texts[path].count(fix.new)
        if before == fix.times:
            texts[path] = texts[path].replace(fix.old, fix.new)
            lines.append(f"{pin.name}: {fix.file}: {fix.old!r} -> {fix.new!r}, {fix.times}x: {fix.why}")
        elif before == 0 and after == fix.times:
            lines.append(f"{pin.name}: {fix.file}: {fix.new!r} is there")
        else:
            problems.append(
                f"{path}: {fix.old!r} is there {before} times and not {fix.times}, so {pin.name} is not the source "
                f"that this fix was made for; compare it with {pin.name}=={pin.version} ({fix.why})"
            )
    if problems:
        raise UserError(problems)
    for path, text in texts.items():
        path.write_text(text)
    return lines


def main() -> None:
    """Fetch, unpack anew and fix the named packages; exit code 2 if one of them is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to unpack")
    parser.add_argument("packages", nargs="+", choices=list(pins()), metavar="PACKAGE", help=", ".join(pins()))
    arguments = parser.parse_args()
    for name in arguments.packages:
        pin = pins()[name]
        shutil.rmtree(arguments.folder / pin.folder, ignore_errors=True)
        source = fetch(pin, arguments.folder)
        print(*patch(pin, source), sep="\n", file=sys.stderr)
        print(source)


if __name__ == "__main__":
    run_command(main)
