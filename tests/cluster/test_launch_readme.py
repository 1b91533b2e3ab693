"""All commands of launch/README.md, in order, on a cluster of three nodes.

The runs are smaller than in the README: configs/tiny_cpu.yaml has fewer steps and loops, and FEWER reduces numbers in
commands. The first run waits 4 s before each step from the third on, so that it still runs when `mythos status` reads
its status and `scancel` sends its signal.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from cluster.cluster import Cluster, install_hint, missing
from helpers.paced import paced

REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(1160),
    pytest.mark.skipif(bool(missing()), reason=install_hint(missing())),
]

FEWER = {  # text in a command -> its replacement: four ranks in the first run, two in later ones
    "run.dir=runs/first train.steps=40": "run.dir=runs/first train.steps=10",
    r"'node1 slots=2\nnode2 slots=2\n'": r"'node1 slots=1\nnode2 slots=1\n'",
    "run.dir=runs/third --nodes 2 --ranks-per-node 2": "run.dir=runs/third --nodes 2 --ranks-per-node 1",
}
SMALLER = """\
base: {base}
model: {{max_loop_iters: 2, dim: 32}}
train: {{steps: 4, global_batch: 4, eval_samples: 4}}
checkpoint: {{every: 2}}
run: {{peak_tflops: 1}}
"""


def project_of(folder: Path) -> Path:
    """A copy of the project with a paced interpreter and a smaller config."""
    project = folder / "project"
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / "configs").mkdir()
    (project / "pyproject.toml").symlink_to(REPOSITORY / "pyproject.toml")
    for name in ("launch", "mythos_dist"):  # the package finds its launch scripts by a link
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, project / name, symlinks=True, ignore=ignored)
    paced(project / ".venv" / "bin", 3, 4)
    mythos = project / ".venv" / "bin" / "mythos"
    mythos.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mythos_dist "$@"\n')
    mythos.chmod(0o755)
    (project / ".venv" / "bin" / "activate").write_text(f'PATH="{mythos.parent}:$PATH"\n')
    base = REPOSITORY / "configs" / "tiny_cpu.yaml"
    (project / "configs" / "tiny_cpu.yaml").write_text(SMALLER.format(base=base))
    return project


def test_the_commands_of_the_launch_readme(tmp_path):
    """Three runs complete, the first after a requeue."""
    project = project_of(tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```", (REPOSITORY / "launch" / "README.md").read_text(), re.M | re.S)
    assert len(blocks) >= 6
    script = "".join(blocks)
    for text, fewer in FEWER.items():
        assert script.count(text) == 1, text
        script = script.replace(text, fewer)
    with Cluster(nodes=3, folder=tmp_path) as cluster:
        script = "set -euo pipefail; set -x\n" + script
        done = cluster.run("ctl", script, cwd=project, env={"PYTHONPATH": str(project)}, check=False, timeout=1080)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    runs = project / "runs"
    assert all((runs / name / "COMPLETED").exists() for name in ("first", "second", "third")), done.stdout
    assert "SIGUSR1" in (runs / "first" / "restarts.jsonl").read_text()
    for text in ("preflight: 4 ranks on 2 nodes", "runs/first: running", "runs/first: completed", "sbatch --"):
        assert text in done.stdout, done.stdout
