"""What the doctor says: of machines that are not here by the facts it would find there, of this one by running it."""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import CheckpointConfig, Config
from mythos_dist.ops.cluster.fabric import infiniband_ports
from mythos_dist.ops.doctor import __main__ as doctor
from mythos_dist.ops.doctor import gpu, kernels, launcher, memory, network, probe, software, storage
from mythos_dist.ops.doctor.gpu import Gpu, Gpus
from mythos_dist.ops.doctor.kernels import Kernels
from mythos_dist.ops.doctor.launcher import Launcher
from mythos_dist.ops.doctor.lines import Line, examine, note, ok
from mythos_dist.ops.doctor.memory import Memory
from mythos_dist.ops.doctor.network import Network
from mythos_dist.ops.doctor.probe import Outcome, Probe
from mythos_dist.ops.doctor.software import Software
from mythos_dist.ops.doctor.storage import Folder, Storage

REPOSITORY = Path(__file__).parents[1]

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85_017_493_504)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 85_051_637_760)
RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", (12, 0), 34_190_917_632)
V100 = Gpu("Tesla V100-SXM2-32GB", (7, 0), 34_072_559_616)
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


def machine(one: Gpu | None = H100, **changes) -> Gpus:
    """A node of eight such GPUs with everything in order, but for `changes`."""
    usable = (one,) * 8 if one else ()
    facts = Gpus("2.14.1", "13.0", CUDA_13, usable, present=("NVIDIA",) * len(usable), driver="580.65.06")
    return replace(facts, **changes)


CPU = machine(None, driver=None)
UNUSABLE = {"usable": (), "kernels": ()}


def worst(lines) -> Line:
    """The first line that is not in order, problems first."""
    lines = list(lines)
    return next(line for status in ("problem", "note", "ok") for line in lines if line.status == status)


def says(line: Line, status: str, *words: str) -> None:
    """A line's status, and words in it or in what to do; whatever is not in order says what to do."""
    assert line.status == status, line
    assert [word for word in words if word not in f"{line.text} -> {line.remedy}"] == [], line
    assert bool(line.remedy) == (status != "ok"), line


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (machine(), "ok", ["2.14.1, built for CUDA 13.0"]),
        (CPU, "note", ["none", "over gloo", "driver 580 or newer"]),
        (
            machine(driver="535.104.05", **UNUSABLE),
            "problem",
            ["8 x NVIDIA", "535.104.05 is too old", "CUDA 13.0 needs 580 or newer", "update the driver"],
        ),
        (machine(cuda=None, driver="570.86", **UNUSABLE), "problem", ["for CPUs only", "CUDA 12 (driver 570.86)"]),
        (machine(visible="", **UNUSABLE), "problem", ["CUDA_VISIBLE_DEVICES='' hides all", "--gpus-per-node"]),
        (machine(refused="Error 802: system not yet initialized", **UNUSABLE), "problem", ["802", "fabricmanager"]),
        (machine(present=(), **UNUSABLE), "problem", ["some x NVIDIA GPU", "no reason"]),
        (machine(driver_hangs=True, **UNUSABLE), "problem", ["nvidia-smi gives no answer", "Xid"]),
        (machine(usable=(H100, A100)), "note", ["1 x NVIDIA H100", "1 x NVIDIA A100", "slowest"]),
        (machine(V100), "problem", ["no kernels for Tesla V100", "compute capability 7.0", "sm_75"]),
        (machine(A100, kernels=("sm_86",)), "problem", ["no kernels for NVIDIA A100"]),
        (machine(driver="570.86"), "note", ["570.86 is older", "compatibility package"]),
    ],
)
def test_gpus(facts, status, words):
    says(worst(gpu.lines(facts)), status, *words)


def test_gpus_in_order_are_named():
    """All of a node, and two of them that CUDA_VISIBLE_DEVICES shows."""
    texts = [line.text for line in gpu.lines(machine())]
    assert "8 x NVIDIA H100 80GB HBM3, compute capability 9.0, 79 GiB" in texts
    assert "580.65.06; CUDA 13.0 needs 580 or newer" in texts
    two = [line.text for line in gpu.lines(machine(usable=(H100, H100), visible="0,1"))]
    assert any("2 x" in text and "of 8 in this machine; CUDA_VISIBLE_DEVICES=0,1" in text for text in two)


@pytest.mark.parametrize("kernels_built", [("sm_80",), ("compute_75",), ()])
def test_code_for_an_earlier_gpu_runs_on_a_later_one(kernels_built):
    """Within a major version, or as PTX; a torch that does not say what it holds is not blamed."""
    a40 = Gpu("NVIDIA A40", (8, 6), 48 << 30)
    assert worst(gpu.lines(machine(a40, kernels=kernels_built))).status == "ok"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("something else", None),
    ],
)
def test_the_version_of_the_driver(text, version):
    """As the closed and the open module write it."""
    assert gpu.driver_version(text) == version


INSTALLED = Kernels({"megablocks": None, "flash_attn": None}, {"flash-attn": "2.8.3", "megablocks": "0.10.0"})
MISSING = Kernels({"megablocks": "stk cannot be imported", "flash_attn": "flash_attn cannot be imported"}, {})


@pytest.mark.parametrize(
    ("facts", "gpus", "status", "words"),
    [
        (INSTALLED, machine(), "ok", []),
        (MISSING, CPU, "ok", []),
        (MISSING, machine(), "note", ["MegaBlocks cannot be used: stk", "bash launch/install_gpu.sh"]),
        (
            INSTALLED,
            machine(A100),
            "note",
            ["compute capability 8.0 a loop over experts", "experts.backend=megablocks"],
        ),
        (INSTALLED, machine(V100), "note", ["compute capability 7.0", "nothing on these GPUs"]),
        (INSTALLED, machine(RTX_5090), "note", ["compute capability 12.0", "after GROUPED_GEMM_CUTLASS=1 bash"]),
        (replace(INSTALLED, missing=MISSING.missing), CPU, "note", ["cannot be used", "megablocks 0.10.0"]),
    ],
)
def test_kernels_of_the_machine(facts, gpus, status, words):
    """What only GPUs use is not missed on a CPU, unless somebody has installed it."""
    says(worst(kernels.lines(facts, gpus)), status, *words)


def configured(*overrides: str) -> Config:
    return load_config(REPOSITORY / "configs" / "1b.yaml", overrides)  # bf16


@pytest.mark.parametrize(
    ("overrides", "facts", "gpus", "topic", "status", "words"),
    [
        ("", MISSING, CPU, "experts.backend", "ok", "experts.backend=grouped -> F.grouped_mm, on a CPU a loop"),
        ("", MISSING, machine(), "experts.backend", "ok", "F.grouped_mm, one kernel per product"),
        ("train.dtype=fp16", MISSING, machine(), "experts.backend", "note", "in fp16 a loop|set train.dtype=bf16"),
        ("", MISSING, machine(A100), "experts.backend", "note", "a loop over experts|install_gpu.sh, then compare"),
        ("experts.backend=reference", MISSING, CPU, "experts.backend", "note", "for tests|experts.backend=grouped"),
        ("experts.backend=megablocks", INSTALLED, machine(), "experts.backend", "ok", "-> MegaBlocks"),
        (
            "experts.backend=megablocks",
            MISSING,
            machine(),
            "experts.backend",
            "problem",
            "cannot run: stk cannot be imported|bash launch/install_gpu.sh, or set experts.backend=grouped",
        ),
        (
            "experts.backend=megablocks train.dtype=fp32",
            MISSING,
            CPU,
            "experts.backend",
            "problem",
            "stk cannot be imported; torch sees no GPU; it computes in bf16 only, and train.dtype=fp32",
        ),
        (
            "experts.backend=megablocks",
            INSTALLED,
            machine(V100),
            "experts.backend",
            "problem",
            "needs compute capability",
        ),
        ("", MISSING, CPU, "train.attention", "ok", "train.attention=auto -> sdpa (no GPU)"),
        ("", INSTALLED, machine(), "train.attention", "ok", "train.attention=auto -> flash-attn"),
        ("", MISSING, machine(), "train.attention", "note", "-> sdpa: flash_attn cannot|bash launch/install_gpu.sh"),
        ("train.dtype=fp32", INSTALLED, machine(), "train.attention", "ok", "-> sdpa (train.dtype=fp32"),
        ("model.v_head_dim=320", INSTALLED, machine(), "train.attention", "ok", "-> sdpa (heads of 320 channels"),
        ("train.attention=sdpa", INSTALLED, machine(), "train.attention", "ok", "-> sdpa"),
        ("train.attention=flash_attn", INSTALLED, machine(), "train.attention", "ok", "-> flash-attn"),
        (
            "train.attention=flash_attn",
            MISSING,
            machine(),
            "train.attention",
            "problem",
            "cannot be|install_gpu.sh, or",
        ),
        (
            "train.attention=flash_attn train.dtype=fp32",
            MISSING,
            CPU,
            "train.attention",
            "problem",
            "flash_attn cannot be imported; no GPU; train.dtype=fp32 is not half precision|set train.attention=auto",
        ),
        ("train.attention=flash_attn", INSTALLED, machine(V100), "train.attention", "problem", "7.0 is below 8.0"),
        ("", MISSING, CPU, "train.dtype", "ok", "bf16"),
        ("", MISSING, machine(V100), "train.dtype", "problem", "no bf16 units|set train.dtype=fp16"),
        ("train.dtype=fp32", MISSING, machine(), "train.dtype", "note", "tensor cores"),
        (
            "train.dtype=fp16",
            replace(MISSING, dtype_refused="train.dtype=fp16 is not supported on this cpu; set it to fp32 or bf16"),
            CPU,
            "train.dtype",
            "problem",
            "not supported on this cpu|set it to fp32 or bf16",
        ),
    ],
)
def test_kernels_of_a_config(overrides, facts, gpus, topic, status, words):
    lines = {line.topic: line for line in kernels.choices(configured(*overrides.split()), facts, gpus)}
    says(lines[topic], status, *words.split("|"))


def test_the_docs_show_the_output():
    """Its lines about a GPU and kernels, word for word, of a machine without GPUs and packages."""
    facts = Kernels({"megablocks": "stk cannot be imported (No module named 'stk')", "flash_attn": "missing"}, {})
    config = configured("experts.backend=megablocks")
    told = [*gpu.lines(CPU), *kernels.choices(config, facts, CPU)]
    wanted = [
        line for line in doctor.shown(told) if not line.startswith(("  ok       torch", "  ok       train.dtype"))
    ]
    readme = (REPOSITORY / "docs" / "running.md").read_text()
    assert len(wanted) == 5 and [line for line in wanted if line not in readme] == []


JOINED = Outcome({"seconds": 0.5})


def network_of(gpus: int = 0, **changes) -> Network:
    facts = Network("2.30.7", True, gpus, JOINED, "node1", Outcome({"node1": "10.0.0.1"}), ("lo", "eth0"), {}, {})
    return replace(facts, **changes)


TWO_MACHINES = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
PORTS = {"mlx5_0:1": "ACTIVE, 400 Gb/sec (4X NDR), InfiniBand"}


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (network_of(), "ok", ["gloo: a process group of one"]),
        (network_of(8, ports=PORTS), "ok", ["NCCL 2.30.7: a process group of one"]),
        (network_of(8, nccl=None), "problem", ["without NCCL"]),
        (
            network_of(joined=Outcome(error="no answer in 20 s")),
            "problem",
            ["cannot be joined", "no answer", "lo, eth0"],
        ),
        (
            network_of(8, environment=TWO_MACHINES),
            "note",
            ["TCP between machines", "/dev/infiniband"],
        ),
        (network_of(ports=PORTS | {"mlx5_1:1": "DOWN, ?, InfiniBand"}), "note", ["not up: mlx5_1:1 DOWN"]),
        (network_of(ports=PORTS, environment={"NCCL_IB_DISABLE": "1"}), "note", ["NCCL_IB_DISABLE=1", "unset"]),
        (network_of(environment={"NCCL_IB_DISABLE": "1"}), "ok", []),
        (network_of(environment={"GLOO_SOCKET_IFNAME": "ib0"}), "problem", ["GLOO_SOCKET_IFNAME=ib0", "lo, eth0"]),
        (network_of(environment={"GLOO_SOCKET_IFNAME": "eth"}), "problem", ["names no interface"]),
        (network_of(environment={"GLOO_SOCKET_IFNAME": "eth0"}), "ok", []),
        (network_of(environment={"NCCL_SOCKET_IFNAME": "ib,eth"}), "ok", []),
        (network_of(environment={"NCCL_SOCKET_IFNAME": "=eth"}), "problem", ["NCCL_SOCKET_IFNAME==eth"]),
        (network_of(environment={"NCCL_SOCKET_IFNAME": "^docker0"}), "ok", []),
        (network_of(environment={"MASTER_ADDR": "node7"}), "problem", ["MASTER_ADDR=node7"]),
        (network_of(addresses=Outcome(error="no answer in 20 s")), "note", ["cannot be looked up"]),
        (
            network_of(addresses=Outcome({"node1": "127.0.1.1"}), environment=TWO_MACHINES),
            "note",
            ["node1 leads to 127.0.1.1", "set GLOO_SOCKET_IFNAME"],
        ),
        (network_of(addresses=Outcome({"node1": "127.0.1.1"})), "ok", []),
    ],
)
def test_network(facts, status, words):
    says(worst(network.lines(facts)), status, *words)


def test_variables_that_steer_communication_are_shown():
    facts = network_of(environment={"NCCL_DEBUG": "INFO", "HOME": "/root"})
    assert "set: NCCL_DEBUG=INFO" in [line.text for line in network.lines(facts)]


def test_infiniband_ports_are_read(tmp_path):
    """In the kernel's layout; a device that says less is there all the same."""
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert infiniband_ports(tmp_path) == {"mlx5_0:1": "ACTIVE, 400 Gb/sec (4X NDR), ?"}
    assert infiniband_ports(tmp_path / "absent") == {}


SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_NTASKS": "16"}
RANK = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
ALL_PROGRAMS = {name: f"/usr/bin/{name}" for name in launcher.PROGRAMS}


@pytest.mark.parametrize(
    ("environment", "programs", "gpus", "status", "words"),
    [
        ({}, ALL_PROGRAMS, 0, "ok", ["none: this process would train alone"]),
        ({}, ALL_PROGRAMS | {"srun": None, "pdsh": None}, 0, "note", ["other machines", "pdsh"]),
        ({}, ALL_PROGRAMS | {"pdsh": None}, 0, "ok", []),
        (SLURM | {"SLURM_NTASKS_PER_NODE": "8"}, ALL_PROGRAMS, 8, "ok", ["job 4711: 2 nodes (node[1-2]), 16 tasks"]),
        (SLURM, ALL_PROGRAMS, 8, "note", ["no --ntasks-per-node", "3 + 1"]),
        (RANK, ALL_PROGRAMS, 8, "ok", ["RANK=9, LOCAL_RANK=1, WORLD_SIZE=16, MASTER_ADDR=node1, MASTER_PORT=29500"]),
        (RANK, ALL_PROGRAMS, 1, "problem", ["LOCAL_RANK=1", "sees 1 GPU:", "--gpus-per-node"]),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            ALL_PROGRAMS,
            0,
            "problem",
            ["LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"],
        ),
        ({"WORLD_SIZE": "1"}, ALL_PROGRAMS, 0, "ok", ["WORLD_SIZE=1"]),
        (RANK | {"RANK": "first"}, ALL_PROGRAMS, 0, "problem", ["RANK=first: not a number"]),
    ],
)
def test_launcher(environment, programs, gpus, status, words):
    says(worst(launcher.lines(Launcher(environment, programs, gpus))), status, *words)


def test_machines_are_counted():
    """By the launcher's ranks, else by the scheduler's nodes; odd values are as if unset."""
    assert launcher.machines({}) == 1
    assert launcher.machines(SLURM) == 2
    assert launcher.machines(TWO_MACHINES) == 2
    assert launcher.machines(SLURM | RANK | {"LOCAL_WORLD_SIZE": "16"}) == 1
    assert launcher.machines({"SLURM_NNODES": "two"}) == 1


def memory_of(**changes) -> Memory:
    facts = Memory(64 << 30, 60 << 30, (32 << 30, 32 << 30), {}, 65536, -1, infiniband=True, gpus=8)
    return replace(facts, **changes)


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (memory_of(), "ok", ["64 GB of 69 GB available"]),
        (memory_of(shared=None), "problem", ["there is none", "--shm-size"]),
        (memory_of(shared=(64 << 20, 60 << 20)), "note", ["0.067 GB free", "--shm-size=1g"]),
        (memory_of(shared=(64 << 20, 60 << 20), gpus=0), "ok", []),
        (memory_of(shared=(32 << 30, 1 << 20), gpus=0), "problem", ["full", "killed jobs"]),
        (memory_of(left={"000000_locals": 100, "nccl-abc": 100}), "note", ["2 segments", "000000_* /dev/shm/nccl-*"]),
        (memory_of(open_files=256), "note", ["at most 256 files", "ulimit -n 65536"]),
        (memory_of(locked=8 << 20), "note", ["0.0084 GB may be locked", "ulimit -l unlimited"]),
        (memory_of(locked=8 << 20, infiniband=False), "ok", []),
    ],
)
def test_memory(facts, status, words):
    says(worst(memory.lines(facts)), status, *words)


def test_what_a_process_has_open_was_not_left_behind(tmp_path):
    """Two of streaming's segments, one mapped by this process; a file of another name is nobody's business."""
    for name in ("000000_locals", "000001_barrier", "000002_notes"):
        (tmp_path / name).write_bytes(bytes(4096))
    with open(tmp_path / "000001_barrier", "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert memory.left_behind(tmp_path) == {"000000_locals": 4096}
    assert set(memory.left_behind(tmp_path)) == {"000000_locals", "000001_barrier"}
    assert memory.left_behind(tmp_path / "absent") == {}


def software_of(reader: Outcome = JOINED, **versions: str | None) -> Software:
    """Streaming with some of its demands."""
    installed = {"torch": "2.14.1+cu130", "deepspeed": "0.19.8", "numpy": "2.1.3", "transformers": "4.57.6"}
    demands = {"mosaicml-streaming": ["numpy<2.2.0,>=1.21.5", "transformers<5", "torch>=1", 'pytest; extra == "dev"']}
    names = {"mosaicml-streaming": "0.13.0"} | installed | versions
    return Software("3.11.7", names, demands, reader)


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (software_of(), "ok", ["3.11.7"]),
        (
            software_of(numpy="2.3.1"),
            "problem",
            ["streaming 0.13.0 needs numpy", "2.3.1 is installed", "pip install 'numpy"],
        ),
        (software_of(transformers=None), "problem", ["needs transformers<5", "it is not installed"]),
        (software_of(torch="2.15.0.dev20260101"), "ok", []),
        (
            software_of(Outcome(error="RuntimeError: torchvision::nms")),
            "problem",
            ["torchvision::nms", "mend what that names"],
        ),
        (software_of(Outcome(error="no answer in 20 s", timed_out=True)), "note", ["no answer", "local disk"]),
    ],
)
def test_software(facts, status, words):
    says(worst(software.lines(facts)), status, *words)


GB = 10**9


def storage_of(free: int = 500 * GB, **changes) -> Storage:
    """Of the 1b model: three checkpoints are 3 x 12.77 GB."""
    facts = Storage(Folder("runs/1b", "runs", free), 1_064_028_034, 0, (), (), "shards: 9 windows of 4096 tokens")
    return replace(facts, **changes)


@pytest.mark.parametrize(
    ("facts", "overrides", "available", "status", "words"),
    [
        (storage_of(), "", 100 * GB, "ok", ["runs/1b (to be made in runs) can be written"]),
        (storage_of(39 * GB), "", 100 * GB, "ok", []),
        (storage_of(38 * GB), "", 100 * GB, "problem", ["keep + 1 = 3 take 38 GB more", "38 GB are free in runs"]),
        (storage_of(38 * GB, present=2 * 12_768_336_408), "", 100 * GB, "ok", []),
        (storage_of(12 * GB, present=99 * GB), "", 100 * GB, "problem", ["take 13 GB more"]),
        (storage_of(50 * GB), "checkpoint.pin=[100]", 100 * GB, "note", ["and 1 pinned take 51 GB", "pin fewer"]),
        (storage_of(), "", 10 * GB, "note", ["copies 13 GB", "10 GB are available", "at least 2 such machines"]),
        (storage_of(), "checkpoint.background=false", 10 * GB, "ok", []),
        (
            storage_of(run=Folder("runs", "runs", 500 * GB, unwritable="Read-only file system")),
            "",
            100 * GB,
            "problem",
            ["nothing can be written in runs: Read-only", "another run.dir"],
        ),
        (
            storage_of(run=Folder("runs", "runs", 500 * GB, unlockable="Function not implemented")),
            "",
            100 * GB,
            "problem",
            ["cannot be locked (Function not implemented)", "-o flock"],
        ),
        (
            storage_of(run_problems=("optim.lr=1, but the run has 2",)),
            "",
            100 * GB,
            "problem",
            ["optim.lr=1", "run.dir"],
        ),
        (
            storage_of(data_problems=("shards: no such folder; set data.path",)),
            "",
            100 * GB,
            "problem",
            ["no such folder"],
        ),
        (
            storage_of(cache=Folder("/tmp/c", "/tmp", 50 * GB), unpacked=90 * GB, unpacked_present=30 * GB),
            "",
            100 * GB,
            "problem",
            ["60 GB more", "/tmp/c", "50 GB are free", "set data.cache"],
        ),
        (
            storage_of(cache=Folder("/tmp/c", "/tmp", 50 * GB), unpacked=90 * GB, unpacked_present=45 * GB),
            "",
            100 * GB,
            "ok",
            [],
        ),
    ],
)
def test_storage(facts, overrides, available, status, words):
    lines = storage.lines(facts, configured(*overrides.split()), available, machines=1)
    says(worst(lines), status, *words)


def test_memory_of_several_machines_holds_the_copy():
    """12.8 GB over two machines with 10 GB each."""
    assert worst(storage.lines(storage_of(), configured(), 10 * GB, machines=2)).status == "ok"


def test_pinned_checkpoints_are_counted_once():
    """Every fifth of 12 steps, and by name 5 again, 7, and one behind the end."""
    assert storage.pinned(CheckpointConfig(pin=(5, 7, 13), pin_every=5), 12) == len({5, 10, 7})
    assert storage.pinned(CheckpointConfig(), 12) == 0


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    """One that is not there yet, below one that is; and one that nothing can be made in, whoever asks."""
    found = storage.look_at(tmp_path / "a" / "b")
    assert (found.existing, found.unwritable, found.unlockable) == (str(tmp_path), "", "")
    assert found.free > 0 and list(tmp_path.iterdir()) == []
    assert storage.look_at(Path("/proc/mythos")).unwritable


def test_a_check_that_fails_is_a_problem():
    """And what it had to say before is not lost in a traceback."""
    (line,) = examine("GPU", lambda: [ok("GPU", str(1 // 0))])
    says(line, "problem", "ZeroDivisionError: integer division or modulo by zero")


@pytest.fixture
def patience(monkeypatch):
    """A probe may take as long as a busy machine needs."""
    monkeypatch.setattr(probe, "SECONDS", 240)


def test_a_group_is_really_joined(monkeypatch, patience):
    """Over loopback; and not over an interface that is not there. A launcher's variables lead to no store of its."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for variable, value in (RANK | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert Probe(probe.join_group).outcome().error == ""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert "nosuch0" in Probe(probe.join_group).outcome().error


def test_names_are_looked_up(monkeypatch, patience):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert Probe(probe.look_up).outcome().values["localhost"] in ("127.0.0.1", "::1")
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")  # a name that is kept free for ever (RFC 6761)
    assert Probe(probe.look_up).outcome().values["no.such.host.invalid"] is None


@pytest.mark.parametrize(
    ("look", "words"),
    [
        (lambda: time.sleep(600), "no answer in 0.5 s"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "died of SIGKILL"),
        (lambda: {"seconds": 1 // 0}, "ZeroDivisionError: integer division"),
    ],
)
def test_a_probe_that_hangs_crashes_or_fails_says_so(look, words):
    assert words in Probe(look).outcome(seconds=0.5 if "answer" in words else 240).error


@pytest.mark.parametrize(
    ("world", "status", "words"),
    [
        ("", "ok", ["any multiple of 4 ranks"]),
        ("8", "ok", ["8 ranks make 4 replicas of 2"]),
        ("6", "problem", ["3 replicas (6 ranks", "parallel.expert=2", "set"]),
    ],
)
def test_ranks_of_a_layout(world, status, words):
    config = configured("parallel.tensor=2", "parallel.expert=2")
    says(worst(doctor.layout(config, {"WORLD_SIZE": world} if world else {})), status, *words)


@pytest.mark.parametrize(
    ("line", "code"), [(note("GPU", "none", "buy one"), 0), (Line("GPU", "problem", "hot", "cool"), 1)]
)
def test_exit_code_and_both_forms(line, code, monkeypatch, capsys):
    """Notes let a job begin, problems do not."""
    told = []
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
        monkeypatch.setattr(doctor, "diagnose", lambda config: [ok("python", "3.11.7"), line])
        with pytest.raises(SystemExit) as left:
            doctor.main()
        assert left.value.code == code
        told.append(capsys.readouterr().out)
    assert told[0].splitlines()[1:4] == [
        "  ok       python  3.11.7",
        f"  {line.status:<7}  GPU     {line.text}",
        f"                   -> {line.remedy}",
    ]
    answer = json.loads(told[1])
    assert answer["problems"] == code and answer["notes"] == 1 - code
    assert answer["lines"][1] == {"topic": "GPU", "status": line.status, "text": line.text, "remedy": line.remedy}


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
    """The whole command. Every subject is there, none could not be looked at, and a config asks for what cannot be:
    MegaBlocks computes in bf16, and the config is in fp32."""
    run_dir = tmp_path / "run"
    told = run(*settings, f"run.dir={run_dir}", "experts.backend=megablocks", "--json", GLOO_SOCKET_IFNAME="lo")
    assert told.returncode == 1 and told.stderr == ""
    answer = json.loads(told.stdout)
    lines = {line["topic"]: line for line in answer["lines"]}
    asked = "train.dtype experts.backend train.attention layout run.dir checkpoint data.path"
    here = "python packages streaming torch GPU grouped_mm megablocks flash_attn network InfiniBand launcher programs"
    assert set(lines) >= {*asked.split(), *here.split(), "memory", "/dev/shm"}
    assert [line for line in answer["lines"] if "could not be looked at" in line["text"]] == []
    assert (
        "MegaBlocks" not in lines["experts.backend"]["text"] and "train.dtype=fp32" in lines["experts.backend"]["text"]
    )
    assert lines["data.path"]["status"] == "ok" and "windows of 32 tokens" in lines["data.path"]["text"]
    assert lines["run.dir"]["status"] == "ok" and not run_dir.exists()
    assert any("was joined on loopback" in line["text"] for line in answer["lines"] if line["topic"] == "network")


def test_a_wrong_config_is_refused_as_by_training():
    """All problems at once, exit code 2, before anything is looked at."""
    told = run("configs/tiny_cpu.yaml", "model.dimm=3", "train.steps=many")
    assert (told.returncode, told.stdout) == (2, "")
    assert "model.dimm: unknown key" in told.stderr and "train.steps='many'" in told.stderr
    assert "Traceback" not in told.stderr
