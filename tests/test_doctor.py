"""The doctor's findings: of machines that do not exist by their facts, of this one by running the command."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import CheckpointConfig, Config
from mythos_dist.errors import UserError
from mythos_dist.model import attend
from mythos_dist.ops.cluster.fabric import infiniband_ports
from mythos_dist.ops.doctor import __main__ as doctor
from mythos_dist.ops.doctor import config_checks, machine_checks, probe
from mythos_dist.ops.doctor.facts import PROGRAMS, Driver, Gpu, Machine, Torch, driver_version
from mythos_dist.ops.doctor.findings import Finding, note, ok, run_check, split_remedy
from mythos_dist.ops.doctor.probe import Outcome, Probe

REPOSITORY = Path(__file__).parents[1]
GB = 10**9

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85_017_493_504)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 85_051_637_760)
RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", (12, 0), 34_190_917_632)
V100 = Gpu("Tesla V100-SXM2-32GB", (7, 0), 34_072_559_616)
JOINED = Outcome({"seconds": 0.5})
MISSING = {"megablocks": "stk cannot be imported", "flash_attn": "flash_attn cannot be imported"}
PORTS = {"mlx5_0:1": "ACTIVE, 400 Gb/sec (4X NDR), InfiniBand"}

# A node of eight H100 with everything in order, and a machine without GPUs.
NODE = Machine(
    env={},
    driver=Driver("580.65.06", ("NVIDIA H100 80GB HBM3",) * 8),
    torch=Torch("2.14.1", "13.0", "2.30.7", (H100,) * 8),
    unavailable={"megablocks": None, "flash_attn": None},
    versions={"flash-attn": "2.8.3", "grouped-gemm": "0.3.0", "megablocks": "0.10.0"},
    group=JOINED,
    interfaces=("lo", "eth0"),
    ports=PORTS,
    programs=PROGRAMS,
    memory=(64 << 30, 100 * GB),
    shared_memory=(32 << 30, 32 << 30),
    open_files=65536,
    locked_memory=-1,
    host="node1",
    addresses=Outcome({"node1": "10.0.0.1"}),
)
CPU = replace(NODE, driver=Driver(), torch=Torch("2.14.1", "13.0"), unavailable=MISSING, versions={}, ports={})


def with_gpus(*gpus: Gpu, machine: Machine = NODE, **torch: Any) -> Machine:
    """The node with other GPUs, or a torch that is built otherwise."""
    return replace(machine, torch=replace(machine.torch, gpus=gpus, **torch))


def configured(*overrides: str) -> Config:
    return load_config(REPOSITORY / "configs" / "1b.yaml", overrides)  # bf16


def worst(findings) -> Finding:
    """The first finding that is not in order, problems first."""
    findings = list(findings)
    return next(one for status in ("problem", "note", "ok") for one in findings if one.status == status)


def expect(finding: Finding, status: str, *words: str) -> None:
    """A finding's status, and words in its text or remedy; all but "ok" have a remedy."""
    assert finding.status == status, finding
    assert [word for word in words if word not in f"{finding.text} -> {finding.remedy}"] == [], finding
    assert bool(finding.remedy) == (status != "ok"), finding


@pytest.mark.parametrize(
    ("machine", "status", "words"),
    [
        (NODE, "ok", ["2.14.1, built for CUDA 13.0"]),
        (CPU, "note", ["none", "with gloo", "NVIDIA's driver"]),
        (
            with_gpus(warning="driver is too old (found version 12020)"),
            "problem",
            ["8 x NVIDIA", "found version 12020"],
        ),
        (with_gpus(cuda=None), "problem", ["for CPUs only", "built for CUDA"]),
        (
            with_gpus(machine=replace(NODE, env={"CUDA_VISIBLE_DEVICES": ""})),
            "problem",
            ["='' hides", "--gpus-per-node"],
        ),
        (with_gpus(machine=replace(NODE, driver=Driver("580"))), "problem", ["some x NVIDIA GPU", "no reason"]),
        (replace(NODE, driver=Driver(hangs=True)), "problem", ["nvidia-smi does not answer", "Xid"]),
        (with_gpus(H100, A100), "note", ["1 x NVIDIA H100", "1 x NVIDIA A100", "slowest"]),
        (
            with_gpus(V100, warning="Found GPU0 Tesla V100 of CC 7.0"),
            "problem",
            ["2.14.1 warns: Found GPU0", "built for"],
        ),
    ],
)
def test_gpus(machine, status, words):
    expect(worst(machine_checks.check_gpus(machine)), status, *words)


def test_gpus_are_listed():
    """All of a node, and the two that CUDA_VISIBLE_DEVICES selects."""
    texts = [finding.text for finding in machine_checks.check_gpus(NODE)]
    assert "8 x NVIDIA H100 80GB HBM3, compute capability 9.0, 79 GiB" in texts and "580.65.06" in texts
    two = machine_checks.check_gpus(with_gpus(H100, H100, machine=replace(NODE, env={"CUDA_VISIBLE_DEVICES": "0,1"})))
    assert any("2 x" in one.text and "of 8 in this machine; CUDA_VISIBLE_DEVICES=0,1" in one.text for one in two)


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
    ("machine", "status", "words"),
    [
        (NODE, "ok", ["one kernel per product"]),
        (CPU, "ok", []),
        (replace(NODE, unavailable=MISSING), "note", ["stk cannot be imported", "bash launch/install_gpu.sh"]),
        (with_gpus(A100), "note", ["compute capability 8.0 a loop over experts", "after bash launch"]),
        (with_gpus(V100), "note", ["compute capability 7.0", "nothing on these GPUs"]),
        (with_gpus(RTX_5090), "note", ["compute capability 12.0", "after GROUPED_GEMM_CUTLASS=1 bash"]),
        (replace(CPU, versions=NODE.versions), "note", ["cannot be imported", "megablocks 0.10.0"]),
    ],
)
def test_kernels_of_the_machine(machine, status, words):
    """Without a GPU the GPU packages are not needed; a broken installation is reported anyway."""
    expect(worst(machine_checks.check_kernels(machine)), status, *words)


@pytest.mark.parametrize(
    ("overrides", "machine", "topic", "status", "words"),
    [
        ("", CPU, "experts.backend", "ok", ["experts.backend=grouped -> F.grouped_mm"]),
        ("train.dtype=fp16", NODE, "experts.backend", "note", ["in fp16 a loop", "set train.dtype=bf16"]),
        ("experts.backend=reference", CPU, "experts.backend", "note", ["for tests", "experts.backend=grouped"]),
        ("experts.backend=megablocks", NODE, "experts.backend", "ok", ["-> MegaBlocks"]),
        ("", CPU, "train.attention", "ok", ["train.attention=auto -> sdpa"]),
        ("", NODE, "train.attention", "ok", ["train.attention=auto -> flash_attn"]),
        (
            "",
            replace(NODE, unavailable=MISSING),
            "train.attention",
            "note",
            ["sdpa: flash_attn cannot", "install_gpu.sh"],
        ),
        ("train.dtype=fp32", replace(NODE, unavailable=MISSING), "train.attention", "ok", ["-> sdpa"]),
        ("train.attention=flash_attn", NODE, "train.attention", "ok", ["-> flash_attn"]),
        ("", CPU, "train.dtype", "ok", ["bf16"]),
        ("", with_gpus(V100), "train.dtype", "problem", ["no bf16 units", "set train.dtype=fp16"]),
        ("train.dtype=fp32", NODE, "train.dtype", "note", ["tensor cores"]),
    ],
)
def test_kernels_of_a_config(overrides, machine, topic, status, words, monkeypatch):
    """Where training's own checks pass."""
    monkeypatch.setattr("mythos_dist.parallel.process.check_dtype", lambda dtype: None)
    monkeypatch.setattr("mythos_dist.train.checks.check_kernels", lambda config: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: machine.capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(attend, "unavailable", machine.unavailable.get)
    findings = {one.topic: one for one in config_checks.check_kernels(machine, configured(*overrides.split()))}
    expect(findings[topic], status, *words)


def test_what_training_refuses_is_a_problem_once(monkeypatch):
    def refuse(dtype):
        raise UserError(f"train.dtype={dtype} is not supported on this cpu; set it to fp32 or bf16")

    monkeypatch.setattr("mythos_dist.parallel.process.check_dtype", refuse)
    config = configured("train.dtype=fp16", "experts.backend=megablocks", "train.attention=flash_attn")
    findings = list(config_checks.check_kernels(CPU, config))
    assert {one.status for one in findings} == {"problem"}
    assert {one.topic for one in findings} == {"train.dtype", "experts.backend", "train.attention"}
    expect(findings[0], "problem", "not supported on this cpu", "set it to fp32 or bf16")


def test_the_docs_show_the_output():
    """Its lines about GPU and kernels, word for word."""
    config = configured("experts.backend=megablocks")
    findings = [*machine_checks.check_gpus(CPU), *config_checks.check_kernels(CPU, config)]
    lines = doctor.as_table([one for one in findings if one.topic in ("GPU", "experts.backend", "train.attention")])
    text = (REPOSITORY / "docs" / "running.md").read_text()
    assert len(lines) == 7 and [line for line in lines if line not in text] == []


@pytest.mark.parametrize(
    ("machine", "status", "words"),
    [
        (CPU, "ok", ["gloo: one process joined"]),
        (NODE, "ok", ["NCCL 2.30.7: one process joined"]),
        (replace(CPU, group=Outcome(error="no answer in 20 s")), "problem", ["cannot join", "no answer", "lo, eth0"]),
        (replace(NODE, ports={}, env={"SLURM_NNODES": "2"}), "note", ["TCP between nodes", "/dev/infiniband"]),
        (replace(NODE, ports={}), "ok", []),
        (replace(CPU, ports=PORTS | {"mlx5_1:1": "DOWN, ?, InfiniBand"}), "note", ["not up: mlx5_1:1 DOWN"]),
        (replace(NODE, env={"NCCL_IB_DISABLE": "1"}), "note", ["NCCL_IB_DISABLE=1 disables InfiniBand", "unset"]),
        (replace(CPU, env={"NCCL_IB_DISABLE": "1"}), "ok", []),
        (replace(CPU, env={"GLOO_SOCKET_IFNAME": "ib0"}), "problem", ["GLOO_SOCKET_IFNAME=ib0", "lo, eth0"]),
        (replace(CPU, env={"GLOO_SOCKET_IFNAME": "eth"}), "problem", ["names no interface"]),
        (replace(CPU, env={"GLOO_SOCKET_IFNAME": "eth0"}), "ok", []),
        (replace(CPU, env={"NCCL_SOCKET_IFNAME": "ib,eth"}), "ok", []),
        (replace(CPU, env={"NCCL_SOCKET_IFNAME": "=eth"}), "problem", ["NCCL_SOCKET_IFNAME==eth"]),
        (replace(CPU, env={"NCCL_SOCKET_IFNAME": "^docker0"}), "ok", []),
        (replace(CPU, env={"MASTER_ADDR": "node7"}), "problem", ["MASTER_ADDR=node7"]),
        (replace(CPU, addresses=Outcome(error="no answer in 20 s")), "note", ["cannot be resolved"]),
        (
            replace(CPU, env={"SLURM_NNODES": "2"}, addresses=Outcome({"node1": "127.0.1.1"})),
            "note",
            ["node1 resolves to 127.0.1.1", "set GLOO_SOCKET_IFNAME"],
        ),
    ],
)
def test_network(machine, status, words):
    expect(worst(machine_checks.check_network(machine)), status, *words)


def test_variables_of_nccl_are_listed():
    machine = replace(CPU, env={"NCCL_DEBUG": "INFO", "HOME": "/root"})
    assert "set: NCCL_DEBUG=INFO" in [finding.text for finding in machine_checks.check_network(machine)]


def test_infiniband_ports_are_read(tmp_path):
    """In the kernel's layout; a missing file is "?"."""
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert infiniband_ports(tmp_path) == {"mlx5_0:1": "ACTIVE, 400 Gb/sec (4X NDR), ?"}
    assert infiniband_ports(tmp_path / "absent") == {}


SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_NTASKS": "16"}
RANK = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("machine", "status", "words"),
    [
        (CPU, "ok", ["none: this process would train alone"]),
        (replace(CPU, programs=("ssh",)), "note", ["other nodes", "pdsh"]),
        (replace(CPU, programs=("srun",)), "ok", []),
        (replace(NODE, env=SLURM), "note", ["no --ntasks-per-node", "3 + 1"]),
        (replace(NODE, env=RANK), "ok", ["torchrun or deepspeed: rank 9 of 16, local rank 1"]),
        (
            with_gpus(H100, machine=replace(NODE, env=RANK)),
            "problem",
            ["local rank 1", "sees 1 GPU", "--gpus-per-node"],
        ),
        (replace(CPU, env={"RANK": "0", "WORLD_SIZE": "2"}), "problem", ["MASTER_ADDR"]),
        (replace(CPU, env={"WORLD_SIZE": "1"}), "ok", ["none"]),
        (replace(CPU, env=RANK | {"RANK": "first"}), "problem", ["RANK=first", "not a number"]),
    ],
)
def test_launcher(machine, status, words):
    expect(worst(machine_checks.check_launcher(machine)), status, *words)


def test_a_slurm_job_is_described():
    machine = replace(NODE, env=SLURM | {"SLURM_NTASKS_PER_NODE": "8"})
    texts = [finding.text for finding in machine_checks.check_launcher(machine)]
    assert "SLURM job 4711: 2 nodes (node[1-2]), 16 tasks" in texts


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
    """From the launcher's ranks, else from SLURM's nodes; values that are no number are ignored."""
    assert replace(CPU, env=env).node_count == nodes


@pytest.mark.parametrize(
    ("machine", "status", "words"),
    [
        (NODE, "ok", ["100 GB of 69 GB available"]),
        (replace(NODE, shared_memory=None), "problem", ["missing", "--shm-size"]),
        (replace(NODE, shared_memory=(64 << 20, 60 << 20)), "note", ["0.063 GB of 0.067 GB free", "--shm-size=1g"]),
        (replace(CPU, shared_memory=(64 << 20, 60 << 20)), "ok", []),
        (replace(CPU, shared_memory=(32 << 30, 1 << 20)), "problem", ["full", "killed jobs"]),
        (replace(NODE, open_files=256), "note", ["may open 256 files", "ulimit -n 65536"]),
        (replace(NODE, locked_memory=8 << 20), "note", ["may lock 0.0084 GB", "ulimit -l unlimited"]),
        (replace(CPU, locked_memory=8 << 20), "ok", []),
    ],
)
def test_memory(machine, status, words):
    expect(worst(machine_checks.check_memory(machine)), status, *words)


@pytest.mark.parametrize(
    ("changes", "reader", "status", "words"),
    [
        ({}, JOINED, "ok", []),
        ({"numpy": "2.3.1"}, JOINED, "problem", ["requires numpy", "2.3.1 is installed", "pip install 'numpy"]),
        ({"transformers": None}, JOINED, "problem", ["requires transformers<5", "it is not installed"]),
        ({"torch": "2.15.0.dev20260101"}, JOINED, "ok", []),
        ({}, Outcome(error="RuntimeError: torchvision::nms"), "problem", ["torchvision::nms", "fix what the error"]),
        ({}, Outcome(error="no answer in 20 s", timed_out=True), "note", ["no answer", "local disk"]),
    ],
)
def test_packages(changes, reader, status, words, monkeypatch):
    """A package with some of mosaicml-streaming's requirements."""
    installed = {"torch": "2.14.1+cu130", "deepspeed": "0.19.8", "numpy": "2.1.3", "transformers": "4.57.6"}
    versions = {name: version for name, version in (installed | changes).items() if version}
    required = ["numpy<2.2.0,>=1.21.5", "transformers<5", "torch>=1", 'pytest; extra == "dev"']
    monkeypatch.setattr(machine_checks.metadata, "requires", lambda name: required)
    expect(worst(machine_checks.check_packages(versions, reader)), status, *words)


def folder_of(free: int = 500 * GB, **changes: str) -> config_checks.Folder:
    return config_checks.Folder("runs/1b", "runs", free)._replace(**changes)


@pytest.mark.parametrize(
    ("free", "present", "overrides", "status", "words"),
    [
        (39, 0, "", "ok", ["3 need 38 GB more", "39 GB free in runs"]),
        (38, 0, "", "problem", ["keep + 1 = 3 need 38 GB more", "38 GB free in runs"]),
        (38, 2 * 12.8, "", "ok", []),
        (12, 99, "", "problem", ["need 13 GB more"]),
        (50, 0, "checkpoint.pin=[100]", "note", ["and 1 pinned need 51 GB", "pin fewer"]),
    ],
)
def test_disk_space_for_checkpoints(free, present, overrides, status, words):
    """Of the 1b model a checkpoint takes 12.8 GB."""
    config = configured(*overrides.split())
    expect(config_checks.checkpoint_room(config, folder_of(free * GB), int(present * GB)), status, *words)


def test_memory_for_the_background_copy_of_a_checkpoint():
    """12.8 GB over the memory of all nodes."""
    one = replace(CPU, memory=(0, 10 * GB))
    (finding,) = config_checks.background_copy(one, configured())
    expect(finding, "note", "copies 13 GB", "10 GB available", "at least 2 such nodes")
    two = replace(one, env={"SLURM_NNODES": "2"})
    assert list(config_checks.background_copy(two, configured())) == []


@pytest.mark.parametrize(
    ("folder", "problems", "status", "words"),
    [
        (folder_of(), [], "ok", ["runs/1b (to be created in runs) can be written"]),
        (folder_of(write_error="Read-only file system"), [], "problem", ["not writable: Read-only", "another run.dir"]),
        (folder_of(lock_error="Not implemented"), [], "problem", ["cannot be locked (Not implemented)", "-o flock"]),
        (folder_of(), ["optim.lr=1, but the run has 2"], "problem", ["optim.lr=1", "set another run.dir"]),
    ],
)
def test_folders(folder, problems, status, words):
    expect(worst(config_checks.folder_findings("run.dir", folder, problems)), status, *words)


def test_room_to_unpack_shards():
    expect(
        config_checks.cache_room(folder_of(50 * GB), 60 * GB), "problem", "60 GB more", "50 GB free", "set data.cache"
    )
    expect(config_checks.cache_room(folder_of(50 * GB), 45 * GB), "ok")


def test_pinned_checkpoints_are_counted_once():
    """Every fifth of 12 steps, and by name 5 again, 7, and one after the end."""
    assert config_checks.count_pinned(CheckpointConfig(pin=(5, 7, 13), pin_every=5), 12) == len({5, 10, 7})
    assert config_checks.count_pinned(CheckpointConfig(), 12) == 0


def test_inspecting_a_folder_leaves_nothing(tmp_path):
    """One that does not exist yet, and one that is not writable."""
    folder = config_checks.inspect_folder(tmp_path / "a" / "b")
    assert (folder.existing, folder.write_error, folder.lock_error) == (str(tmp_path), "", "")
    assert folder.free > 0 and list(tmp_path.iterdir()) == []
    assert config_checks.inspect_folder(Path("/proc/mythos")).write_error


def test_a_check_that_raises_is_a_problem():
    (finding,) = run_check("GPU", lambda: [ok("GPU", str(1 // 0))])
    expect(finding, "problem", "ZeroDivisionError: integer division or modulo by zero")


def test_a_message_is_split_before_its_remedy():
    assert split_remedy("a", "b; c; d") == Finding("a", "problem", "b; c", "d")
    assert split_remedy("a", "b", "d") == Finding("a", "problem", "b", "d")


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
    assert Probe(probe.join_group).outcome().error == ""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert "nosuch0" in Probe(probe.join_group).outcome().error


def test_the_probe_resolves_names(monkeypatch, slow_machine):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert Probe(probe.resolve_names).outcome().values["localhost"] in ("127.0.0.1", "::1")
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")  # a name that never exists (RFC 6761)
    assert Probe(probe.resolve_names).outcome().values["no.such.host.invalid"] is None


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


@pytest.mark.parametrize(
    ("world", "status", "words"),
    [
        ("", "ok", ["any multiple of 4 ranks"]),
        ("8", "ok", ["8 ranks form 4 replicas of 2"]),
        ("6", "problem", ["replicas, 3 (6 ranks", "parallel.expert=2", "set"]),
    ],
)
def test_ranks_of_a_layout(world, status, words):
    config = configured("parallel.tensor=2", "parallel.expert=2")
    expect(worst(config_checks.check_layout(replace(CPU, env={"WORLD_SIZE": world}), config)), status, *words)


@pytest.mark.parametrize(
    ("finding", "code"), [(note("GPU", "none", "buy one"), 0), (Finding("GPU", "problem", "hot", "cool"), 1)]
)
def test_exit_code_text_and_json(finding, code, monkeypatch, capsys):
    """Exit code 1 with a problem, 0 with notes only."""
    outputs = []
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
        monkeypatch.setattr(doctor, "diagnose", lambda config: [ok("python", "3.11.7"), finding])
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
    code += "runpy.run_module('mythos_dist.ops.doctor', run_name='__main__', alter_sys=True)"
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
    of_config = "train.dtype experts.backend train.attention layout run.dir checkpoint data.path"
    of_machine = (
        "python packages streaming torch GPU grouped_mm megablocks flash_attn network InfiniBand launcher programs"
    )
    assert set(findings) >= {*of_config.split(), *of_machine.split(), "memory", "/dev/shm"}
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
