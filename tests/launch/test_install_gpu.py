"""launch/install_gpu.sh and its helpers: sources, their fixes, the plan, the order of builds, the check."""

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.megablocks_cpu import REPOSITORY, fetch, launch_script, result_of, start
from packaging.requirements import Requirement

from mythos_dist.errors import UserError

pytestmark = pytest.mark.launch

SCRIPT = REPOSITORY / "launch" / "install_gpu.sh"
TOOLS = "bash cat cut date dirname env grep mkdir nproc pwd sed sh sort tail tee tr".split()
gpu_sources = launch_script("gpu_sources")
check_gpu = launch_script("check_gpu")
PINS = gpu_sources.pins()


# Sources and fixes


@pytest.fixture(params=list(PINS))
def copy(request, tmp_path) -> tuple:
    """A package's pin, and the files of its published source that are to be fixed, in a folder of the test's own."""
    pin = PINS[request.param]
    try:
        (source,) = fetch(pin.name)
    except UserError as error:
        pytest.skip(f"the source of {pin.name} is not to be had here: {error}")
    for file in {"setup.py", *(fix.file for fix in gpu_sources.FIXES[pin.name])}:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(source / file, tmp_path / file)
    return pin, tmp_path


def contents(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_fixes_apply_to_the_published_sources_once(copy):
    """A second time changes nothing."""
    pin, folder = copy
    fixes = gpu_sources.FIXES[pin.name]
    published = contents(folder)
    assert [line.count(" -> ") for line in gpu_sources.patch(pin, folder)] == [1] * len(fixes)
    fixed = contents(folder)
    assert {str(path.relative_to(folder)) for path in fixed if fixed[path] != published[path]} == {
        f.file for f in fixes
    }
    assert all(line.endswith("is applied already") for line in gpu_sources.patch(pin, folder))
    assert contents(folder) == fixed


def test_fixed_sources_build_with_what_is_installed(copy):
    """No flag for C++17, which torch's headers refuse; no pin that an installed package breaks; no CUB argument."""
    pin, folder = copy
    gpu_sources.patch(pin, folder)
    setup = (folder / "setup.py").read_text()
    assert '"-std=c++17"' not in setup
    for requirement in map(Requirement, install_requires(setup)):
        if requirement.name in ("torch", "numpy", "packaging"):
            assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), requirement
    header = folder / "csrc" / "cumsum.h"
    if header.exists():
        calls = header.read_text().split("CUDA_CALL(cub::DeviceScan::")[1:]
        assert len(calls) == 2
        assert all("debug_synchronous" not in call.partition(";")[0] for call in calls)


def install_requires(setup: str) -> list[str]:
    """The strings of `install_requires`, a list in the call of setup or a variable of that name."""
    for node in ast.walk(ast.parse(setup)):
        if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == ["install_requires"]:
            return ast.literal_eval(node.value)
        if isinstance(node, ast.keyword) and node.arg == "install_requires" and isinstance(node.value, ast.List):
            return ast.literal_eval(node.value)
    return []


def test_an_unexpected_source_is_not_changed(tmp_path):
    """Every fix that does not apply is reported with its file; the one that applies is not made."""
    pin = PINS["megablocks"]
    (tmp_path / "setup.py").write_text("install_requires = ['torch>=2.7.0,<2.7.1', 'numpy>=1.21.5,<2.1.0'] * 2\n")
    with pytest.raises(UserError) as caught:
        gpu_sources.patch(pin, tmp_path)
    assert len(caught.value.problems) == 2
    assert str(tmp_path / "csrc" / "cumsum.h") in caught.value.problems[0]
    assert "occurs 0 times instead of 2" in caught.value.problems[0]
    assert "'packaging>=21.3.0,<24.2'" in caught.value.problems[1]
    assert "torch>=2.7.0,<2.7.1" in (tmp_path / "setup.py").read_text()


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> tuple:
    """A small package in a local folder that pip uses instead of an index, and its pin."""
    source = tmp_path / "work" / "small_thing-1.0"
    source.mkdir(parents=True)
    (source / "setup.py").write_text("from setuptools import setup\nsetup(name='small-thing', version='1.0')\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0\n")
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    archive = shelf / "small_thing-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "small_thing-1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return archive, pin_of("small-thing", "1.0", sha256)


def pin_of(name: str, version: str, sha256: str):
    return gpu_sources.Pin(name, version, sha256, f"{name}=={version} --hash=sha256:{sha256}")


def test_a_source_is_downloaded_by_pip_once(shelf, tmp_path):
    archive, pin = shelf
    source = gpu_sources.fetch(pin, tmp_path / "sources")
    assert "small-thing" in (source / "setup.py").read_text()
    assert [path.name for path in (tmp_path / "sources").iterdir()] == ["small_thing-1.0"]
    archive.unlink()
    assert gpu_sources.fetch(pin, tmp_path / "sources") == source


def test_an_archive_with_another_hash_is_refused(shelf, tmp_path):
    """Before its setup.py is run; no file remains."""
    _, pin = shelf
    wrong = pin_of(pin.name, pin.version, "0" * 64)
    with pytest.raises(UserError, match=r"small-thing==1\.0 cannot be downloaded.*HASHES"):
        gpu_sources.fetch(wrong, tmp_path / "sources")
    assert list((tmp_path / "sources").iterdir()) == []


# The script


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A folder `bin`, the only one on PATH, with a g++ and an nvcc of CUDA 13.0 that do nothing, and a python.

    This python has only the packages in the folder `packages`: a stub of torch 2.14.1+cu130 without a GPU. It records
    calls of pip and gpu_sources.py in the file `calls` and does not run them.
    """
    bin = tmp_path / "bin"
    bin.mkdir()
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path is not None, tool
        (bin / tool).symlink_to(path)
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "include").mkdir()
    (toolkit / "include" / "cusparse.h").touch()
    executable(bin / "g++", "exit 1")
    executable(
        bin / "nvcc",
        f"""case $1 in
            --version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
            --dryrun) echo '#$ TOP={toolkit}/bin/..' >&2 ;;
        esac""",
    )
    executable(
        bin / "python",
        f"""case $1 in
            -m | */gpu_sources.py) echo "$@ jobs=$MAX_JOBS cuda=$CUDA_HOME" >> {tmp_path}/calls
                [ -z "$FAIL_ON" ] || case "$*" in *$FAIL_ON*) echo 'nvcc: fatal'; exit 3 ;; esac ;;
            *) exec {sys.executable} -S "$@" ;;
        esac""",
    )
    add_file(tmp_path, "torch/__init__.py", "from . import cuda, version\n__version__ = '2.14.1+cu130'\n")
    add_file(tmp_path, "torch/version.py", "cuda = '13.0'\n")
    add_file(tmp_path, "torch/cuda.py", "def is_available():\n    return False\n")
    for name in list(os.environ):
        if name.startswith(("CUDA", "TORCH", "PYTHON", "VIRTUAL_ENV", "GROUPED", "CPATH", "CXX", "MAX_JOBS", "FLASH")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(bin))
    monkeypatch.setenv("PYTHON", str(bin / "python"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


def executable(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def add_file(machine: Path, file: str, text: str = "") -> None:
    """A file among the packages that the machine's python sees."""
    path = machine / "packages" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def add_package(machine: Path, name: str, version: str, *modules: str) -> None:
    """An installed distribution with empty modules."""
    add_file(
        machine, f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    for module in modules:
        add_file(machine, f"{module}.py")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=1000)


def test_a_dry_run_shows_the_plan_and_changes_nothing(machine):
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    assert "torch 2.14.1+cu130" in done.stdout
    assert f"{machine / 'toolkit'}, CUDA 13.0" in done.stdout
    assert "8.0;9.0;10.0 (TORCH_CUDA_ARCH_LIST); no GPU here" in done.stdout
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("build")] == [
        f"{name}:" for name in PINS
    ]
    assert "GROUPED_GEMM_CUTLASS=0" in done.stdout
    assert not (machine / "home").exists()
    assert "install" not in (machine / "calls").read_text()


def test_all_missing_prerequisites_are_reported_at_once(machine, monkeypatch):
    """No nvcc, no compiler, no torch, and settings that cannot be: exit code 2, one line each."""
    (machine / "bin" / "nvcc").unlink()
    (machine / "bin" / "g++").unlink()
    shutil.rmtree(machine / "packages" / "torch")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;H100")
    monkeypatch.setenv("MAX_JOBS", "all")
    done = run("--dry-run")
    assert done.returncode == 2
    first, *problems = done.stderr.splitlines()
    assert first == "error: 6 problems"
    for words in [
        ("torch cannot be imported", "No module named 'torch'", "install torch"),
        ("nvcc is not on the PATH", "CUDA_HOME", "install the CUDA 13 toolkit"),
        ("7.5 has no bf16",),
        ("H100 is not a compute capability", "8.0;9.0"),
        ("MAX_JOBS=all", "a number"),
        ("g++ is not on the PATH", "CXX"),
    ]:
        assert any(all(word in problem for word in words) for problem in problems), words


@pytest.mark.parametrize(
    ("toolkit", "cuda", "error"),
    [
        (
            "12.8",
            "'13.0'",
            "nvcc belongs to CUDA 12.8, but torch 2.14.1+cu130 is built with CUDA 13.0; set CUDA_HOME to a",
        ),
        ("13.0", "None", "torch 2.14.1+cu130 is built without CUDA; install a build with CUDA (see pytorch.org)"),
    ],
)
def test_a_toolkit_and_a_torch_that_do_not_fit_are_refused(machine, toolkit, cuda, error):
    executable(machine / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {toolkit}, V{toolkit}.61'")
    add_file(machine, "torch/version.py", f"cuda = {cuda}\n")
    (machine / "include").mkdir()
    (machine / "include" / "cusparse.h").touch()
    done = run("--dry-run")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {error}")


def test_headers_missing_from_the_toolkit_come_from_the_packages_of_torch(machine):
    (machine / "toolkit" / "include" / "cusparse.h").unlink()
    done = run("--dry-run")
    assert done.returncode == 2
    assert "no include/cusparse.h" in done.stderr
    add_file(machine, "nvidia/cu13/include/cusparse.h")
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"headers from {machine}/packages/nvidia/cu13/include" in done.stdout


def test_all_wrong_arguments_are_reported_at_once(machine):
    done = run("--only", "megablocks,apex", "--verbose")
    assert done.returncode == 2
    assert "error: 2 problems" in done.stderr
    assert "unknown argument --verbose" in done.stderr
    assert "--only apex: unknown package; choose from stanford-stk grouped_gemm megablocks flash-attn" in done.stderr


def test_installed_packages_are_skipped(machine):
    """By version, and by whether it can be imported; --force builds it all the same."""
    add_package(machine, "stanford_stk", "0.7.1", "stk")
    add_package(machine, "grouped_gemm", "0.2.0", "grouped_gemm")
    add_package(machine, "megablocks", "0.10.0")
    plan = run("--dry-run").stdout
    assert "skip      stanford-stk: is installed" in plan
    assert "build     grouped_gemm: 0.2.0 is installed" in plan
    assert "build     megablocks: megablocks_ops cannot be imported (No module named 'megablocks_ops')" in plan
    assert "build     flash-attn: is not installed" in plan
    assert "build     stanford-stk: is installed, but --force is set" in run("--dry-run", "--force").stdout


def test_a_build_fetches_fixes_and_installs_without_dependencies(machine):
    """In order, with the settings in the environment and everything in the log; then the check."""
    add_package(machine, "stanford_stk", "0.7.1", "stk")
    add_package(machine, "grouped_gemm", "0.3.0", "grouped_gemm", "grouped_gemm_backend")
    done = run("--only", "stanford-stk,grouped_gemm", "--force", "--build-dir", str(machine / "build"))
    assert done.returncode == 0, done.stdout + done.stderr
    _, tools, *calls = (machine / "calls").read_text().splitlines()
    assert "-m pip install setuptools wheel ninja" in tools
    assert len(calls) == 4
    for name, folder, fetched, built in [
        ("stanford-stk", "stanford_stk-0.7.1", *calls[:2]),
        ("grouped_gemm", "grouped_gemm-0.3.0", *calls[2:]),
    ]:
        assert f"gpu_sources.py {machine}/build {name}" in fetched
        assert f"--no-deps --no-build-isolation --force-reinstall {machine}/build/{folder}" in built
        assert f"cuda={machine}/toolkit" in built
    assert "stanford-stk 0.7.1: can be imported" in done.stdout
    log = (machine / "build" / "install_gpu.log").read_text()
    assert "grouped_gemm: build" in log
    assert "grouped_gemm 0.3.0: can be imported" in log


def test_a_failed_build_shows_the_end_of_its_log_and_the_path(machine, monkeypatch):
    """And fails the run, as does a package that cannot be imported after its build."""
    build = machine / "build"
    done = run("--only", "stanford-stk", "--build-dir", str(build))
    assert done.returncode == 1 and "stanford-stk 0.7.1: is not installed" in done.stdout
    assert "a check failed" in done.stderr
    monkeypatch.setenv("FAIL_ON", "force-reinstall")
    done = run("--build-dir", str(build))
    assert done.returncode == 1 and "nvcc: fatal" in done.stderr and f"see {build}/install_gpu.log" in done.stderr
    assert "grouped_gemm" not in (machine / "calls").read_text()


# The check


def test_the_checks_pass_for_the_real_packages():
    """The real MegaBlocks on grouped_gemm, with the mocks of `helpers/megablocks_cpu.py` for what needs a GPU."""
    try:
        sources = fetch("megablocks", "stanford-stk", "grouped_gemm")
    except UserError as error:
        pytest.skip(f"MegaBlocks' sources are not to be had here: {error}")
    errors = result_of(start("check_gpu", ["megablocks"], sources, TRITON_INTERPRET="1"))
    assert all(0 < error < check_gpu.TOLERANCE for error in errors.values()), errors


@pytest.mark.parametrize(("looks_ahead", "good"), [(False, True), (True, False)])
def test_the_check_of_flash_attn_detects_a_wrong_result(looks_ahead, good, monkeypatch):
    """The softmax written out in its place: correct if causal, wrong otherwise."""

    def flash_attn_func(q, k, v, softmax_scale: float, **settings):
        k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for tensor in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
        future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        if not looks_ahead:
            scores = scores.masked_fill(future, float("-inf"))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    module = ModuleType("flash_attn")
    module.flash_attn_func = module.flash_attn_varlen_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert (check_gpu.CHECKS["flash-attn"]("cpu") < check_gpu.TOLERANCE) == good


def test_a_wrong_result_and_an_exception_fail(monkeypatch):
    monkeypatch.setattr(check_gpu, "missing", lambda name: None)
    monkeypatch.setitem(check_gpu.CHECKS, "megablocks", lambda device: 0.5)
    monkeypatch.setitem(check_gpu.CHECKS, "flash-attn", lambda device: torch.zeros(1)[1])
    good, line = check_gpu.check_package("megablocks", "a GPU")
    assert not good
    assert "DIFFERS from plain torch on a GPU, relative error 5.0e-01" in line
    good, line = check_gpu.check_package("flash-attn", "a GPU")
    assert not good
    assert "fails on a GPU" in line
    assert check_gpu.check_package("stanford-stk", "a GPU") == (True, "stanford-stk 0.7.1: can be imported")
