"""Conversions and imports that are killed at random, also with a store as output, resume and write the same bytes."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest
from helpers.conversion import contents, ended
from helpers.token_files import write_megatron

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).parents[2]
# The tools with parts of one row group, or 16 kB of tokens.
TOOL = """
import runpy, sys
import mythos_dist.prepare.part
import mythos_dist.prepare.tokens.flat
mythos_dist.prepare.part.MIN_PART_BYTES = 1
mythos_dist.prepare.tokens.flat.TEXT_CHUNK_BYTES = 1 << 14
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def commands(tokenizer, tmp_path_factory) -> dict[str, list[str]]:
    """The tools without --out, for some 60 parts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    work = tmp_path_factory.mktemp("faults")
    texts = ([topics[name] for name in sorted(topics)] * 8)[:600]
    pq.write_table(pa.table({"text": texts}), work / "corpus.parquet", row_group_size=10)
    tokens = write_megatron(work / "tokens", [[*tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in texts])
    common = ["--tokenizer", str(tokenizer.path), "--seq-len", "64", "--heldout", "0.1", "--workers", "2", "--quiet"]
    return {
        "make_shards": ["make_shards.py", "--input", str(work / "corpus.parquet"), *common],
        "import_tokens": ["import_tokens.py", str(tokens), *common],
    }


def start(command: list[str], out: str, scratch: Path) -> subprocess.Popen:
    tool, *rest = command
    given = [str(REPOSITORY / "tools" / tool), *rest, "--out", out, "--scratch", str(scratch)]
    return subprocess.Popen([sys.executable, "-c", TOOL, *given], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen) -> None:
    _, errors = job.communicate(timeout=400)
    assert (job.returncode, errors) == (0, "")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [3, pytest.param(7, marks=pytest.mark.long)])
@pytest.mark.parametrize("tool, to_store", [("make_shards", True), ("import_tokens", True), ("import_tokens", False)])
def test_after_kills_the_output_is_that_of_an_uninterrupted_run(store, commands, tmp_path, seed, tool, to_store, kills):
    """kill -9 of the tool; its workers end by themselves. Of a store, every second start has an empty scratch folder,
    as on another machine, and a few requests fail."""
    command, draw = commands[tool], random.Random(seed)
    finish(start(command, str(tmp_path / "uninterrupted"), tmp_path / "unused"))
    expected = contents(tmp_path / "uninterrupted")
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    url = store.create_bucket(f"{tool.replace('_', '-')}-{seed % 10**6}-{kills}") if to_store else str(out)

    def recorded() -> int:
        """Parts that are finished, and uploaded to a store."""
        if to_store:
            with store.proxy.lock:
                return sum("unfinished/part-" in path for _, path in store.proxy.written)
        return len(list(out.glob("unfinished/part-*.json")))

    store.proxy.fault = lambda path, number: "reset" if draw.random() < 0.02 else None
    for kill in range(kills):
        job, before = start(command, url, scratch), recorded()
        more, deadline = draw.randrange(1, 12), time.monotonic() + 400
        while job.poll() is None and recorded() < before + more and kill % 3:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.random() * 0.3)
        family = (
            [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)] if job.poll() is None else []
        )
        job.kill()
        job.communicate()
        assert ended(family, 240), "a worker outlived its parent"
        if kill % 2:
            shutil.rmtree(scratch, ignore_errors=True)
    finish(start(command, url, scratch))
    assert (store.content(url) if to_store else contents(out)) == expected
    assert not [path for path in contents(scratch) if not path.endswith("lock")] if scratch.exists() else True
    assert os.listdir(tmp_path / "unused") == [] if (tmp_path / "unused").exists() else True
