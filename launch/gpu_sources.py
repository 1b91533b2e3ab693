"""Download the sources of the GPU packages with pip, verify their hashes, unpack and patch them.

A patch replaces a text that must occur an exact number of times: otherwise it is another release, whose build would
fail an hour later or, worse, succeed. Prints the folder of each package's source.
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
        """Folder in the archive, and the archive's name without ".tar.gz"."""
        return f"{self.name.replace('-', '_')}-{self.version}"


@dataclass(frozen=True)
class Fix:
    """Replace `old`, which occurs `times` times in `file`, by `new`."""

    file: str
    old: str
    new: str
    times: int
    why: str


_STANDARD = "torch's headers require C++20 (from torch 2.14)"
_PIN = "the pin would downgrade torch, numpy or packaging, and is not needed"
FIXES: dict[str, list[Fix]] = {
    "stanford-stk": [],
    "grouped_gemm": [Fix("setup.py", '"-std=c++17"', '"-std=c++20"', 1, _STANDARD)],
    "megablocks": [
        Fix(
            "csrc/cumsum.h",
            "stream,\n\t\t\t\t\t    debug_synchronous));",
            "stream));",
            2,
            "CUB removed the argument debug_synchronous (databricks/megablocks#180)",
        ),
        Fix("setup.py", "'torch>=2.7.0,<2.7.1'", "'torch>=2.7.0'", 1, _PIN),
        Fix("setup.py", "'numpy>=1.21.5,<2.1.0'", "'numpy>=1.21.5'", 1, _PIN),
        Fix("setup.py", "'packaging>=21.3.0,<24.2'", "'packaging>=21.3.0'", 1, _PIN),
    ],
    "flash-attn": [Fix("setup.py", '"-std=c++17"', '"-std=c++20"', 4, _STANDARD)],
}


def pins() -> dict[str, Pin]:
    """All pinned packages by name, in build order."""
    pattern = re.compile(r"^([\w-]+)==(\S+) --hash=sha256:([0-9a-f]{64})$", re.MULTILINE)
    return {match[1]: Pin(match[1], match[2], match[3], match[0]) for match in pattern.finditer(PINS.read_text())}


def fetch(pin: Pin, folder: Path) -> Path:
    """The unpacked source in `folder`, as published; downloaded unless it exists. Raises UserError if that fails."""
    source = folder / pin.folder
    if source.is_dir():
        return source
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        archive = _download(pin, Path(work))
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        if sha256 != pin.sha256:
            raise UserError(f"{archive.name} has sha256 {sha256}, not {pin.sha256}; so it is not the pinned release")
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        try:
            Path(work, pin.folder).rename(source)
        except OSError:  # another process created it
            if not source.is_dir():
                raise
    return source


def _download(pin: Pin, folder: Path) -> Path:
    """The archive, by pip, which uses the user's mirrors and proxies.

    pip also runs the package's setup.py to read its name. That imports torch and looks for a GPU and CUDA, unless
    environment variables are set; nothing is compiled.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(pin.line + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "--retries", "1", "--timeout", "30"]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    variables = {
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "CUDA_HOME": "/usr/local/cuda",
        "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE",
    }
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    archive = folder / f"{pin.folder}.tar.gz"
    if not archive.exists():
        output = (done.stdout + done.stderr).strip().splitlines() or [f"pip exited with code {done.returncode}"]
        errors = [line.strip() for line in output if "rror:" in line.lower()]
        reason = "; ".join(errors[-3:] or output[-1:])
        raise UserError(f"{pin.name}=={pin.version} cannot be downloaded: {reason}; see `pip config list`")
    return archive


def patch(pin: Pin, source: Path) -> list[str]:
    """Apply the package's fixes to `source`, unless applied already; returns a line for each.

    Raises UserError with all problems, and changes nothing, if a text does not occur as often as expected.
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
            lines.append(f"{pin.name}: {fix.file}: {fix.new!r} is applied already")
        else:
            problems.append(
                f"{path}: {fix.old!r} occurs {before} times instead of {fix.times}, so this is not the source that the "
                f"fix is for; compare it with {pin.name}=={pin.version} ({fix.why})"
            )
    if problems:
        raise UserError(problems)
    for path, text in texts.items():
        path.write_text(text)
    return lines


def main() -> None:
    """Fetch, unpack and patch the named packages; exit code 2 if a source is not the expected one."""
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
