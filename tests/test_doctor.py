"""The doctor's findings: of machines that do not exist by their facts, of this one by running the command."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.shard_folder import SEQ_LEN, VOCAB_SIZE, write_folder
from helpers.small_run import SMALL, TINY

from mythos_dist import doctor
from mythos_dist.config.dump import dump_config
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.data.windows import WindowReader
from mythos_dist.errors import UserError
from mythos_dist.model import attend
from mythos_dist.ops.cluster.fabric import infiniband_ports
from mythos_dist.ops.doctor import config_checks, probe
from mythos_dist.ops.doctor import machine as facts
from mythos_dist.ops.doctor.findings import Check, FactError, Finding, note, ok, problem
from mythos_dist.ops.doctor.machine import Driver, Machine, Torch, driver_version
from mythos_dist.ops.doctor.machine_checks import MACHINE_CHECKS
from mythos_dist.ops.doctor.probe import Outcome, Probe
from mythos_dist.progress import Bar
from mythos_dist.train.checks import open_data

REPOSITORY = Path(__file__).parents[1]
GB = 10**9


class Gpu(NamedTuple):
    """What is used of torch.cuda.get_device_properties."""

    name: str
    major: int
    minor: int
    total_memory: int


H100 = Gpu("NVIDIA H100 80GB HBM3", 9, 0, 85_017_493_504)
A100 = Gpu("NVIDIA A100-SXM4-80GB", 8, 0, 85_051_637_760)
RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", 12, 0, 34_190_917_632)
V100 = Gpu("Tesla V100-SXM2-32GB", 7, 0, 34_072_559_616)
MISSING = {"megablocks": "stk cannot be imported", "flash_attn": "flash_attn cannot be imported"}
PORTS = {"mlx5_0:1": "ACTIVE, 400 Gb/sec (4X NDR), InfiniBand"}
DOWN = {"mlx5_1:1": "DOWN, ?, InfiniBand"}
TORCH = Torch("2.14.1", "13.0", "2.30.7", (H100,) * 8)
UNUSABLE = TORCH._replace(gpus=())
FACTS: dict[str, Any] = {  # of a node of eight H100 with everything in order
    "env": {},
    "driver": Driver("580.65.06", ("NVIDIA H100 80GB HBM3",) * 8),
    "torch": TORCH,
    "unavailable": {"megablocks": None, "flash_attn": None},
    "group": Outcome(seconds=0.5),
    "host_name": ("node1", ""),
    "ports": PORTS,
    "memory": (64 << 30, 100 * GB),
    "shared_memory": (32 << 30, 0, 32 << 30),
    "locked_memory": -1,
    "free_bytes": lambda path: 500 * GB,
}
NO_GPU = {"driver": Driver(), "torch": UNUSABLE, "unavailable": MISSING, "ports": {}}


def node(*gpus: Gpu, **changes: Any) -> Machine:
    """The node with other facts; `gpus`: those that torch can use."""
    given = FACTS | changes
    return Machine(**given | {"torch": given["torch"]._replace(gpus=gpus or given["torch"].gpus)})


def cpu(**changes: Any) -> Machine:
    """A machine without GPUs."""
    return node(**NO_GPU | changes)


def configured(*overrides: str) -> Config:
    return load_config(REPOSITORY / "configs" / "1b.yaml", overrides)  # bf16


def find(topic: str, machine: Machine, config: Config | None = None) -> list[Finding]:
    """The findings about a topic."""
    if config:
        checks = [check for check in config_checks.config_checks(config) if check.topic == topic]
        return [one for check in checks for one in check.run(machine, config)]
    return [one for check in MACHINE_CHECKS for one in check.run(machine) if one.topic == topic]


def worst(findings: list[Finding]) -> Finding:
    """The first finding that is not in order, problems first."""
    return next(one for status in ("problem", "note", "ok") for one in findings if one.status == status)


def expect(finding: Finding, status: str, *words: str) -> None:
    """A finding's status, and words in its text or remedy; all but "ok" have a remedy."""
    assert finding.status == status, finding
    assert [word for word in words if word not in f"{finding.text} -> {finding.remedy}"] == [], finding
    assert bool(finding.remedy) == (status != "ok"), finding


SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_NTASKS": "16"}
RANK = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SMALL_SHM = (64 << 20, 0, 60 << 20)
CASES = {
    "torch": [(node(), "ok", ["2.14.1, built for CUDA 13.0"])],
    "driver": [
        (node(), "ok", ["580.65.06"]),
        (node(torch=UNUSABLE, driver=Driver(hangs=True)), "problem", ["nvidia-smi does not answer", "Xid"]),
    ],
    "GPU": [
        (node(), "ok", ["8 x NVIDIA H100 80GB HBM3, compute capability 9.0, 79 GiB"]),
        (
            node(H100, H100, env={"CUDA_VISIBLE_DEVICES": "0,1"}),
            "ok",
            ["2 x", "of 8 in this machine; CUDA_VISIBLE_DEVICES=0,1"],
        ),
        (node(H100, H100), "ok", ["2 x", "(of 8 in this machine)"]),
        (cpu(), "note", ["none", "with gloo", "NVIDIA's driver"]),
        (
            node(torch=UNUSABLE._replace(warning="driver is too old (found 12020)")),
            "problem",
            ["8 x NVIDIA", "found 12020"],
        ),
        (node(torch=UNUSABLE._replace(cuda=None)), "problem", ["for CPUs only", "built for CUDA"]),
        (
            node(torch=UNUSABLE, env={"CUDA_VISIBLE_DEVICES": ""}),
            "problem",
            ["this machine has 8 x", "='' hides", "--gpus-per-node"],
        ),
        (node(torch=UNUSABLE, driver=Driver("580")), "problem", ["some x NVIDIA GPU", "no reason"]),
        (node(H100, A100), "note", ["1 x NVIDIA H100", "1 x NVIDIA A100", "slowest"]),
        (
            node(V100, torch=TORCH._replace(warning="Found GPU0 of CC 7.0")),
            "problem",
            ["torch warns: Found GPU0", "built for"],
        ),
        (
            node(H100, torch=TORCH._replace(warning="Can't initialize NVML")),
            "note",
            ["warns: Can't", "libnvidia-ml.so"],
        ),
        (node(H100, env=RANK), "problem", ["local rank 1", "sees 1 GPU", "--gpus-per-node"]),
        (node(env=RANK), "ok", []),
    ],
    "megablocks": [
        (node(), "ok", ["can be imported"]),
        (cpu(), "ok", ["stk cannot be imported; only GPUs use it"]),
        (node(unavailable=MISSING), "note", ["stk cannot be imported", "bash launch/install_gpu.sh"]),
    ],
    "network": [
        (cpu(), "ok", ["gloo: one process joined"]),
        (node(), "ok", ["NCCL 2.30.7: one process joined"]),
        (cpu(group=Outcome(error="no answer in 20 s")), "problem", ["cannot join", "no answer", "NCCL_SOCKET_IFNAME"]),
        (cpu(host_name=("box", "Name or service not known")), "note", ["name box has no address", "--local-addr"]),
        (node(env={"NCCL_IB_DISABLE": "1"}), "note", ["slow: NCCL_IB_DISABLE=1", "unset NCCL_IB_DISABLE,"]),
    ],
    "InfiniBand": [
        (node(), "ok", ["mlx5_0:1 ACTIVE, 400 Gb/sec"]),
        (node(ports={}, env={"SLURM_NNODES": "2"}), "note", ["TCP between nodes", "/dev/infiniband"]),
        (node(ports={}), "ok", ["no active port"]),
        (cpu(ports=PORTS | DOWN), "note", ["not up: mlx5_1:1 DOWN"]),
        (node(locked_memory=8 << 20), "note", ["may lock 0.0084 GB", "ulimit -l unlimited"]),
    ],
    "memory": [(node(), "ok", ["100 GB of 69 GB available"])],
    "/dev/shm": [
        (node(), "ok", ["34 GB of 34 GB free"]),
        (node(shared_memory=None), "problem", ["missing: 0 GB of 0 GB", "--shm-size"]),
        (node(shared_memory=SMALL_SHM), "note", ["0.063 GB of 0.067 GB free", "--shm-size=1g"]),
        (cpu(shared_memory=SMALL_SHM), "ok", []),
        (cpu(shared_memory=(32 << 30, 0, 1 << 20)), "problem", ["full", "killed jobs"]),
    ],
}


@pytest.mark.parametrize(
    ("topic", "machine", "status", "words"),
    [(topic, *case) for topic, cases in CASES.items() for case in cases],
)
def test_findings_about_a_machine(topic, machine, status, words):
    expect(worst(find(topic, machine)), status, *words)


def test_what_is_not_limited_is_not_mentioned():
    """Nor is a limit on locked memory where there is no InfiniBand."""
    for machine in (node(), cpu(locked_memory=8 << 20)):
        assert [one.status for one in find("InfiniBand", machine)] == ["ok"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("something else", None),
    ],
)
def test_the_driver_version_is_read_from_proc(text, version):
    """As the closed and the open module write it."""
    assert driver_version(text) == version


@pytest.mark.parametrize(
    ("overrides", "machine", "topic", "status", "words"),
    [
        ("", cpu(), "experts.backend", "ok", ["experts.backend=grouped -> F.grouped_mm"]),
        ("train.dtype=fp16", node(), "experts.backend", "note", ["9.0 a loop over experts", "set train.dtype=bf16"]),
        ("", node(), "experts.backend", "ok", ["experts.backend=grouped -> F.grouped_mm"]),
        ("", node(A100), "experts.backend", "note", ["in bf16 on compute capability 8.0 a loop", "after bash launch"]),
        ("", node(RTX_5090), "experts.backend", "note", ["12.0 a loop", "after GROUPED_GEMM_CUTLASS=1 bash"]),
        ("experts.backend=reference", cpu(), "experts.backend", "note", ["for tests", "experts.backend=grouped"]),
        ("experts.backend=megablocks", node(), "experts.backend", "ok", ["-> MegaBlocks"]),
        ("", cpu(), "train.attention", "ok", ["train.attention=auto -> sdpa"]),
        ("", node(), "train.attention", "ok", ["train.attention=auto -> flash_attn"]),
        ("", node(unavailable=MISSING), "train.attention", "note", ["sdpa: flash_attn cannot", "install_gpu.sh"]),
        ("train.dtype=fp32", node(unavailable=MISSING), "train.attention", "ok", ["-> sdpa"]),
        ("train.attention=flash_attn", node(), "train.attention", "ok", ["-> flash_attn"]),
        ("", cpu(), "train.dtype", "ok", ["bf16"]),
        ("", node(V100), "train.dtype", "problem", ["no bf16 units", "set train.dtype=fp16"]),
        ("train.dtype=fp32", node(), "train.dtype", "note", ["tensor cores"]),
    ],
)
def test_kernels_of_a_config(overrides, machine, topic, status, words, monkeypatch):
    """Where training's own checks pass."""
    monkeypatch.setattr("mythos_dist.parallel.process.check_dtype", lambda dtype: None)
    monkeypatch.setattr("mythos_dist.train.checks.check_megablocks", lambda dtype: None)
    monkeypatch.setattr(
        "mythos_dist.train.checks.device", lambda: torch.device("cuda" if machine.torch.gpus else "cpu")
    )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: machine.capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(attend, "unavailable", machine.unavailable.get)
    (finding,) = find(topic, machine, configured(*overrides.split()))
    expect(finding, status, *words)


@pytest.mark.parametrize(
    ("override", "topic", "words"),
    [
        ("train.dtype=fp16", "train.dtype", ["not supported on this cpu", "set it to fp32 or bf16"]),
        ("experts.backend=megablocks", "experts.backend", ["torch sees none", "set experts.backend=grouped"]),
        ("train.attention=flash_attn", "train.attention", ["runs on a GPU, not on cpu", "set train.attention=auto"]),
        ("train.compile=true", "train.compile", ["there is no C++ compiler no-such-g++", "set it to false"]),
    ],
)
def test_what_training_refuses_is_a_problem(override, topic, words, monkeypatch):
    def refuse(dtype):
        raise UserError(f"train.dtype={dtype} is not supported on this cpu; set it to fp32 or bf16")

    monkeypatch.setattr("mythos_dist.parallel.process.check_dtype", refuse)
    monkeypatch.setenv("CXX", "no-such-g++")
    *others, last = find(topic, cpu(), configured(override))
    expect(last, "problem", *words)
    assert all(finding.status == "problem" for finding in others)


def test_the_docs_show_the_output():
    """Its lines about GPU and kernels, word for word."""
    config = configured("experts.backend=megablocks")
    findings = [one for topic in ("experts.backend", "train.attention") for one in find(topic, cpu(), config)]
    lines = doctor.as_table([*find("GPU", cpu()), *findings])
    text = (REPOSITORY / "docs" / "running.md").read_text()
    assert len(lines) == 7 and [line for line in lines if line not in text] == []


def test_variables_of_nccl_and_gloo_are_shown():
    *_, finding = find("network", cpu(env={"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "HOME": "/root"}))
    expect(finding, "ok", "set: GLOO_SOCKET_IFNAME=eth0, NCCL_DEBUG=INFO")


def test_infiniband_ports_are_read(tmp_path):
    """In the kernel's layout; a missing file is "?"."""
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert infiniband_ports(tmp_path) == {"mlx5_0:1": "ACTIVE, 400 Gb/sec (4X NDR), ?"}
    assert infiniband_ports(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("env", "nodes"),
    [
        ({}, 1),
        (SLURM, 2),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 2),
        (SLURM | RANK | {"LOCAL_WORLD_SIZE": "16"}, 1),
        ({"SLURM_NNODES": "two"}, 1),
    ],
)
def test_nodes_are_counted(env, nodes):
    """From the launcher's ranks, else from SLURM's nodes; values that are not numbers are ignored."""
    assert cpu(env=env).node_count == nodes


@pytest.mark.parametrize(
    ("free", "present", "overrides", "status", "words"),
    [
        (39, 0, "", "ok", ["3 need 38 GB more", "39 GB free in"]),
        (38, 0, "", "problem", ["keep + 1 = 3 need 38 GB more", "38 GB free in"]),
        (38, 2 * 12.8, "", "ok", []),
        (12, 99, "", "problem", ["need 13 GB more"]),
        (50, 0, "checkpoint.pin=[100]", "note", ["and 1 pinned need 51 GB", "pin_every"]),
        (
            50,
            0,
            "checkpoint.remote=s3://b/r",
            "note",
            ["and up to 8 that wait for their upload need 141 GB", "remote_backlog"],
        ),
        # Every fifth of 12 steps, and by name 5 again, 7, and one after the end.
        (
            38,
            0,
            "train.steps=12 optim.warmup_steps=1 checkpoint.pin_every=5 checkpoint.pin=[5,7,13]",
            "problem",
            ["3 pinned"],
        ),
    ],
)
def test_disk_space_for_checkpoints(free, present, overrides, status, words, tmp_path):
    """Of the 1b model a checkpoint takes 12.8 GB."""
    (tmp_path / "checkpoints").mkdir()
    with open(tmp_path / "checkpoints" / "sparse", "wb") as file:
        file.truncate(int(present * GB))
    machine = cpu(free_bytes=lambda path: free * GB)
    expect(worst(find("checkpoint", machine, configured(f"run.dir={tmp_path}", *overrides.split()))), status, *words)


def test_memory_for_the_background_copy_of_a_checkpoint():
    """12.8 GB over the memory of all nodes."""
    *_, finding = find("checkpoint", cpu(memory=(0, 10 * GB)), configured())
    assert finding.topic == "checkpoint.background"
    expect(finding, "note", "copies 13 GB", "10 GB available", "at least 2 such nodes")
    two = cpu(memory=(0, 10 * GB), env={"SLURM_NNODES": "2"})
    assert {one.topic for one in find("checkpoint", two, configured())} == {"checkpoint"}


@pytest.mark.parametrize(("path", "words"), [("new", []), ("file", ["is a file", "name a folder"])])
def test_folders(path, words, tmp_path):
    """One that can be created, and what training refuses. Nothing is left."""
    (tmp_path / "file").touch()
    (finding,) = find("run.dir", cpu(), configured(f"run.dir={tmp_path / path}"))
    expect(finding, "problem" if words else "ok", *words)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_run_of_another_config_is_a_problem_with_a_remedy(tmp_path):
    """Each setting that differs."""
    (tmp_path / "config.yaml").write_text(dump_config(configured(f"run.dir={tmp_path}")))
    first, *_ = find("run.dir", cpu(), configured(f"run.dir={tmp_path}", "optim.lr=1e-5"))
    expect(first, "problem", "optim.lr=1e-05", "set another run.dir")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Config:
    """A config with compressed shards."""
    folder = write_folder(tmp_path_factory.mktemp("compressed") / "shards", [6, 4], compression="zstd:3")
    sizes = f"train.seq_len={SEQ_LEN}", f"model.vocab_size={VOCAB_SIZE}"
    return load_config(TINY, [*SMALL, *sizes, f"data.path={folder}", f"data.cache={folder.parent / 'cache'}"])


@pytest.mark.parametrize(("free", "status"), [(0, "problem"), (GB, "ok")])
def test_room_to_unpack_shards(free, status, compressed):
    shards, room = find("data.path", cpu(free_bytes=lambda path: free), compressed)
    expect(shards, "ok", "10 windows of 16 tokens")
    expect(room, status, "unpacked shards in", "GB more", *["set data.cache"] * (status == "problem"))


def test_unpacked_shards_need_no_room(compressed):
    """They are in the cache after training has read them."""
    (corpus,) = open_data(compressed)
    for split, shards in corpus.shards.items():
        windows = range(corpus.manifest.splits[split].windows)
        WindowReader(shards, SEQ_LEN + 1, cache=compressed.data.cache).read(windows)
    *_, room = find("data.path", cpu(free_bytes=lambda path: 10), compressed)
    expect(room, "ok", "need 0 GB more")


def test_a_fact_that_cannot_be_read_is_one_problem(monkeypatch):
    """It hides only the findings that need it: torch is broken, and so is the file with InfiniBand's ports."""

    def unreadable():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises ModuleNotFoundError
    monkeypatch.setattr(facts, "infiniband_ports", unreadable)
    machine = Machine(**{name: value for name, value in FACTS.items() if name not in ("torch", "ports")})
    monkeypatch.setattr(doctor, "Machine", lambda probe: machine)
    findings = list(dict.fromkeys(doctor.diagnose(None, Bar("checking"))))
    problems = {one.topic: one for one in findings if one.status == "problem"}
    assert set(problems) == {"torch", "ports"} and len([one for one in findings if one.status == "problem"]) == 2
    expect(problems["torch"], "problem", "cannot be read (ModuleNotFoundError: import of torch halted")
    expect(problems["ports"], "problem", "cannot be read (OSError: [Errno 5] Input/output error)")
    others = {"python", "packages", "driver", "memory"}
    assert {one.topic for one in findings if one.status == "ok"} >= others


def test_a_fact_is_read_once(monkeypatch):
    """Also if that fails."""
    reads = []

    def ports():
        reads.append("ports")
        return {}

    def memory():
        reads.append("memory")
        raise ZeroDivisionError("1 / 0")

    monkeypatch.setattr(facts, "infiniband_ports", ports)
    monkeypatch.setattr(facts, "node_memory", memory)
    machine = Machine()
    assert machine.ports is machine.ports
    for _ in range(2):
        with pytest.raises(FactError, match="ZeroDivisionError: 1 / 0"):
            _ = machine.memory
    assert reads == ["ports", "memory"]


def test_a_check_that_raises_is_a_problem_after_its_findings():
    def check():
        yield ok("fine")
        yield ok(str(1 // 0))

    first, second = Check("GPU", check).run()
    assert first == ok("fine", topic="GPU")
    expect(second, "problem", "this check failed (ZeroDivisionError: integer division or modulo by zero)")


def test_a_refusal_is_split_before_its_remedy():
    def check():
        raise UserError(["b; c; d", "e"], source="file")

    found = [problem("file: b; c", "d", "a"), problem("file: e", "fix it", "a")]
    assert list(Check("a", check, "fix it").run()) == found


@pytest.fixture
def slow_machine(monkeypatch):
    """A probe may take as long as a busy machine needs."""
    monkeypatch.setattr(probe, "SECONDS", 240)


def test_the_probe_joins_a_group(monkeypatch, slow_machine):
    """Over loopback, whatever store a launcher's variables name; not over an interface that does not exist."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for variable, value in (RANK | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    joined = Probe(probe.join_group).outcome()
    assert joined.error == "" and joined.seconds > 0
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert "nosuch0" in Probe(probe.join_group).outcome().error


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: time.sleep(600), "no answer in 0.5 s"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda: {"seconds": 1 // 0}, "ZeroDivisionError: integer division"),
    ],
)
def test_a_probe_that_hangs_crashes_or_raises_has_an_error(function, words):
    assert words in Probe(function).outcome(seconds=0.5 if "answer" in words else 240).error


@pytest.mark.parametrize(("finding", "code"), [(note("none", "buy one", "GPU"), 0), (problem("hot", "cool", "GPU"), 1)])
def test_exit_code_text_and_json(finding, code, monkeypatch, capsys):
    """Exit code 1 with a problem, 0 with notes only."""
    outputs = []
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
        monkeypatch.setattr(doctor, "diagnose", lambda config, shown: [ok("3.11.7", topic="python"), finding])
        with pytest.raises(SystemExit) as exit:
            doctor.main()
        assert exit.value.code == code
        outputs.append(capsys.readouterr().out)
    assert outputs[0].splitlines()[1:4] == [
        "  ok       python  3.11.7",
        f"  {finding.status:<7}  GPU     {finding.text}",
        f"                   -> {finding.remedy}",
    ]
    report = json.loads(outputs[1])
    assert report["problems"] == code and report["notes"] == 1 - code
    expected = {"topic": "GPU", "status": finding.status, "text": finding.text, "remedy": finding.remedy}
    assert report["lines"][1] == expected


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, whose probes may take as long as a busy machine needs."""
    code = "import runpy\nfrom mythos_dist.ops.doctor import probe\nprobe.SECONDS = 240\n"
    code += "runpy.run_module('mythos_dist.doctor', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, timeout=900, env={**os.environ, **environment}
    )


@pytest.mark.launch
def test_this_machine(settings, tmp_path):
    """The whole command, with a config that cannot run: MegaBlocks computes in bf16, and the config is in fp32."""
    run_dir = tmp_path / "run"
    done = run(*settings, f"run.dir={run_dir}", "experts.backend=megablocks", "--json", GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 1 and done.stderr == ""
    report = json.loads(done.stdout)
    findings = {line["topic"]: line for line in report["lines"]}
    of_config = "train.dtype experts.backend train.attention run.dir checkpoint data.path"
    of_machine = "python packages torch GPU megablocks flash_attn network InfiniBand memory /dev/shm"
    assert set(findings) >= {*of_config.split(), *of_machine.split()}
    assert [line for line in report["lines"] if "this check failed" in line["text"]] == []
    experts = [line for line in report["lines"] if line["topic"] == "experts.backend"]
    assert {line["status"] for line in experts} == {"problem"}
    assert any("bf16" in line["text"] for line in experts)
    assert findings["data.path"]["status"] == "ok" and "windows of 32 tokens" in findings["data.path"]["text"]
    assert findings["run.dir"]["status"] == "ok" and not run_dir.exists()
    assert any("joined a process group" in line["text"] for line in report["lines"] if line["topic"] == "network")


def test_a_wrong_config_is_refused_as_by_training():
    """All problems at once, exit code 2, before any check runs."""
    done = run("configs/tiny_cpu.yaml", "model.dimm=3", "train.steps=many")
    assert (done.returncode, done.stdout) == (2, "")
    assert "model.dimm: unknown key" in done.stderr and "train.steps='many'" in done.stderr
    assert "Traceback" not in done.stderr
