"""Every command of launch/README.md, one after the other as they stand there, on a cluster of three nodes."""

import re
import shutil
from pathlib import Path

import pytest
from cluster.cluster import Cluster, advice, missing

REPOSITORY = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(1160),
    pytest.mark.skipif(bool(missing()), reason=advice(missing())),
]


def test_the_commands_of_the_launch_readme(tmp_path):
    """In a project folder of their own; they end with three runs that are done, the first after a requeue."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("mythos_dist", "configs", "tools", ".venv", "pyproject.toml"):
        (project / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "launch", project / "launch")
    blocks = re.findall(r"^```bash\n(.*?)^```", (REPOSITORY / "launch" / "README.md").read_text(), re.M | re.S)
    assert len(blocks) >= 6
    with Cluster(nodes=3, folder=tmp_path) as cluster:
        script = "set -euo pipefail; set -x\n" + "".join(blocks)
        done = cluster.run("ctl", script, cwd=project, env={"PYTHONPATH": str(REPOSITORY)}, check=False, timeout=1080)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    runs = project / "runs"
    assert all((runs / name / "COMPLETED").exists() for name in ("first", "second", "third")), done.stdout
    assert "SIGUSR1" in (runs / "first" / "restarts.jsonl").read_text()
    for words in ("preflight: 4 ranks on 2 nodes", "runs/first: running", "runs/first: finished", "sbatch --"):
        assert words in done.stdout, done.stdout
