"""The command `mythos`: its list, help, completion, configs by name, and a wheel that has all of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from helpers.small_run import REPOSITORY
from packaging.requirements import Requirement

from mythos_dist import __version__
from mythos_dist.commands import COMMANDS, GROUPS
from mythos_dist.commands import main as mythos
from mythos_dist.config.load import find_config, load_config
from mythos_dist.errors import UserError
from mythos_dist.ops.plan.clusters import load_cluster

PINS = [
    Requirement(line) for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")
]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mythos_dist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment})


def exit_of(monkeypatch, capsys, *arguments: str) -> tuple[object, str, str]:
    """Exit code, standard output and error of `mythos ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["mythos", *arguments])
    with pytest.raises(SystemExit) as exited:
        mythos.main()
    return exited.value.code, *capsys.readouterr()


def test_the_list_has_every_command_line_of_the_package_and_of_tools():
    """Each parser shows the name that was typed; the help of a command is one short line."""
    listed = {command.module for command in COMMANDS}
    files = {path.stem for path in (REPOSITORY / "mythos_dist" / "commands").glob("[!_]*.py")} - {"main"}
    assert {module.removeprefix("mythos_dist.commands.") for module in listed if ".commands." in module} == files
    for path in [*REPOSITORY.glob("tools/*.py"), *REPOSITORY.glob("launch/*.py")]:
        if named := re.match(r'"""Another name of `mythos (.*)`', path.read_text()):
            assert named[1] in {command.name for command in COMMANDS if command.module.endswith(f".{path.stem}")}
    for command in COMMANDS:
        assert command.load_parser().format_usage().startswith(f"usage: mythos {command.name} ")
        assert command.group in GROUPS and len(command.help) <= 70


def test_messages_and_docs_name_commands_as_mythos():
    """The scripts of tools/ and `python -m` are other names; the README says so once."""
    scripts = "|".join(command.module.rpartition(".")[2] for command in COMMANDS)
    other = re.compile(rf"\b(?:tools|launch)/(?:{scripts})\.py|python -m mythos_dist\.(?:train|doctor)\b")
    pages = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"), REPOSITORY / "launch" / "README.md"]
    pages += [*REPOSITORY.glob("configs/**/*.yaml"), *REPOSITORY.glob("mythos_dist/**/*.py")]
    pages.remove(Path(mythos.__file__))  # it explains the other names
    found = [(page.name, match[0]) for page in pages for match in other.finditer(page.read_text())]
    assert found == [] and len(pages) > 200
    assert (REPOSITORY / "README.md").read_text().count("the same commands as scripts") == 1


def test_help_lists_the_commands_by_group_and_a_typo_suggests_the_nearest(monkeypatch, capsys):
    code, out, _ = exit_of(monkeypatch, capsys, "--help")
    assert code == 0 and [line[:-1] for line in out.splitlines() if line[:-1] in GROUPS] == list(GROUPS)
    assert all(re.search(rf"^  {command.name}  ", out, re.MULTILINE) for command in COMMANDS)
    for typed, meant in {
        "pln": "plan",
        "make_shards": "shards",
        "inspect_checkpoint": "inspect",
        "import hff": "import hf",
        "resume": "train",
    }.items():
        code, out, err = exit_of(monkeypatch, capsys, *typed.split())
        assert (code, out) == (
            2,
            "",
        ) and err == f"error: mythos has no command {typed!r}; did you mean mythos {meant}?\n"
    for typed, message in {
        "": "usage: mythos COMMAND",
        "import": "import open-mythos",
        "xyzzy": "--help lists",
    }.items():
        code, out, err = exit_of(monkeypatch, capsys, *typed.split())
        assert (code, out) == (2, "") and message in err
    assert exit_of(monkeypatch, capsys, "plan", "--gpus", "x")[0] == 2
    code, out, err = exit_of(monkeypatch, capsys, "generate", "runs/demo")
    assert (code, out) == (2, "") and "name a --prompt to continue" in err
    for typed in ([], ["plan"], ["import"]):
        assert exit_of(monkeypatch, capsys, "help", *typed) == exit_of(monkeypatch, capsys, *typed, "--help")
    asked, described = run("help", "train"), run("train", "--help")  # training ends its process
    assert (asked.returncode, asked.stdout) == (0, described.stdout) and "usage: mythos train" in asked.stdout


@pytest.mark.parametrize(
    ("settings", "spins"),
    [
        ({}, "2000"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
    ],
    ids=str,
)
@pytest.mark.launch
def test_threads_that_wait_soon_sleep_unless_the_user_decides(settings, spins, tmp_path):
    """As OpenMP itself reports when training imports torch."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | settings
    command = [sys.executable, "-m", "mythos_dist.train", "tiny_cpu", "data.path=missing", f"run.dir={tmp_path}/run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)
    assert result.returncode == 2 and "missing: no such folder" in result.stderr
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)) == {spins}


def test_configs_and_clusters_of_the_package_are_found_by_name(tmp_path, monkeypatch):
    """A file of that name has precedence; nothing outside of the package's folder is found."""
    monkeypatch.chdir(tmp_path)
    assert load_config("1b") == load_config(REPOSITORY / "configs" / "1b.yaml")
    assert find_config("recipes/sft").is_file() and load_cluster("h100_80gb").gpus_per_node == 8
    (tmp_path / "1b").write_text("model: {dim: 64}\n")
    assert find_config("1b") == Path("1b")
    for name in ("../configs/1b", "configs/1b.yaml", "/1b", "1b.yaml"):
        assert not find_config(name).is_file()
    with pytest.raises(UserError, match=r"did you mean tiny_cpu\? the package contains 100b"):
        load_config("tiny_cp")


def test_constraints_pin_every_requirement_at_a_release_that_pyproject_allows():
    """For each Python version; `make constraints` adds what is missing. No index, path or URL, no build of torch."""
    required = [Requirement(text) for text in metadata.requires("mythos_dist") or []]
    for python in ("3.10", "3.11", "3.12", "3.13"):
        environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
        pins = {pin.name.lower(): pin for pin in PINS if not pin.marker or pin.marker.evaluate(environment)}
        for requirement in required:
            if requirement.name == "mythos_dist":
                continue
            pin = pins.get(requirement.name.lower().replace("_", "-"))
            assert pin, f"{requirement} has no pin: run `make constraints`"
            (version,) = (specifier.version for specifier in pin.specifier)
            assert requirement.specifier.contains(version), f"{pin} contradicts {requirement}: run `make constraints`"
    assert not [pin for pin in PINS if pin.url or "+" in str(pin.specifier) or pin.name.startswith("nvidia")]


def test_images_and_the_citation_are_of_this_repository():
    """What the images copy exists, and they and CI run our own commands."""
    files = {
        name: (REPOSITORY / name).read_text() for name in ("Dockerfile", "apptainer.def", ".github/workflows/ci.yml")
    }
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", files["Dockerfile"], re.M) for word in line.split()]
    copied += re.findall(r"^    (\S+) /opt/mythos_dist/", files["apptainer.def"], re.M)
    assert {"pyproject.toml", "constraints.txt", "configs", "launch", "mythos_dist"} <= set(copied)
    kept = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert all((REPOSITORY / name).exists() and f"!{name}" in kept for name in copied)
    assert "run: .ci/run" in files[".github/workflows/ci.yml"]
    assert f"\nversion: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()


@pytest.mark.launch
def test_tab_completes_commands_options_settings_and_names_of_configs(tmp_path):
    for line, expected in {
        "mythos pl": ["plan"],
        "mythos import h": ["hf"],
        "mythos import hf --dtype ": ["fp32", "bf16", "fp16"],
        "mythos train tiny_c": ["tiny_cpu"],
        "mythos train tiny_cpu optim.l": ["optim.lr="],
    }.items():
        out = tmp_path / "completions"
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        run(**asked, _ARGCOMPLETE_STDOUT_FILENAME=str(out), _ARGCOMPLETE_SUPPRESS_SPACE="1")
        assert out.read_text().split("\n") == expected
    assert "complete" in run("completion", "bash").stdout


@pytest.mark.launch
def test_a_wheel_runs_in_an_empty_folder(tmp_path):
    """It has the configs, the launch scripts and the command, and does not need the repository."""
    source, unpacked, folder = (tmp_path / name for name in ("source", "unpacked", "folder"))
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("mythos_dist", "configs", "launch"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(unpacked)
    assert "mythos = mythos_dist.commands.main:main" in next(unpacked.glob("*.dist-info/entry_points.txt")).read_text()
    # In front of the editable installation; no environment of its own, which would take gigabytes.
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); from mythos_dist.commands.main import main; main()"

    def wheel_run(*arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(wheel_run("plan", "1b", "--gpus", "16", "--top", "1", "--json"))["fits"]
    submitted = wheel_run("submit", "tiny_cpu", "--nodes", "1", "--dry-run")
    assert submitted.startswith(f"PYTHON={sys.executable} sbatch ") and f"{unpacked}/mythos_dist/launch/" in submitted
