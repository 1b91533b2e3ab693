"""Runs, tools and commands do not import modules that they never use. Each case runs in its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = [
    "launch/status.py",
    "launch/submit.py",
    *sorted(f"tools/{path.name}" for path in REPOSITORY.glob("tools/*.py")),
]
COMMANDS = ["mythos_dist", "mythos_dist.train", "mythos_dist.doctor", "mythos_dist.ops.cluster.allocation"]

# Installed top-level packages, and why a plain run without wandb does not need them.
UNUSED = {
    "transformers": "streaming's text datasets import it: 2,800 files are read",
    "torchvision": "streaming's image datasets import it",
    "streaming": "its shard reader is imported alone, without leaving a module of this name",
    "setuptools": "DeepSpeed's table of compatible ops imports it, and then runs the C compiler",
    "wandb": "run.wandb=disabled",
    "matplotlib": "only tools plot",
    "tokenizers": "shards hold token ids, not text",
    "sentencepiece": "shards hold token ids, not text",
    "huggingface_hub": "nothing is downloaded",
    "fsspec": "shards are local files",
    "pandas": "unused; libraries import it if it is installed",
}


def run(code: str, *arguments: str) -> str:
    """Run `code` in a new interpreter and return its standard output."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_imports_no_unused_package(settings, tmp_path):
    """A run of one step, from the command line to its end. Also: objects of imported modules are frozen for the gc."""
    code = """if True:
        import gc, json, sys
        from mythos_dist.train.__main__ import main

        main()
        modules = sorted({name.partition(".")[0] for name in sys.modules})
        print(json.dumps([modules, gc.get_freeze_count(), gc.isenabled()]))
    """
    out = run(code, *settings, f"run.dir={tmp_path}", "train.steps=1", "train.eval_samples=0", "run.wandb=disabled")
    modules, num_frozen, collects = json.loads(out.splitlines()[-1])
    assert {"torch", "deepspeed"} <= set(modules), "the run is a real one"
    assert {name: UNUSED[name] for name in modules if name in UNUSED} == {}
    assert num_frozen > 100_000 and collects, "objects of imported modules are not collected; later ones are"


def test_restore_and_model_import_no_compiler():
    """torch._dynamo is 800 modules and 1.2 s of CPU. Training imports it anyway, through torch's optimizers."""
    code = """if True:
        import sys
        import mythos_dist.checkpoint.restore, mythos_dist.train.loop

        print("torch._dynamo" in sys.modules, "mythos_dist.model.mythos" in sys.modules)
    """
    assert run(code) == "False True\n"


def test_help_and_usage_errors_import_no_torch():
    """All tools and commands run one after the other in one process; the first that imports torch fails the test."""
    code = """if True:
        import contextlib, io, os, runpy, sys

        os._exit = sys.exit  # training ends by it
        for name in sys.argv[1:]:
            for arguments in ["--help"], ["--no-such-option"]:
                sys.argv = [name, *arguments]
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    try:
                        run = runpy.run_path if name.endswith(".py") else runpy.run_module
                        run(name, run_name="__main__")
                    except SystemExit as error:
                        assert error.code == (0 if arguments == ["--help"] else 2), (sys.argv, error.code)
                    else:
                        raise AssertionError(f"{sys.argv} did not exit")
                assert "torch" not in sys.modules, f"{sys.argv} imported torch"
        print("done")
    """
    assert run(code, *SCRIPTS, *COMMANDS) == "done\n"


def test_importing_the_shard_reader_alone_does_not_change_streaming():
    """The reader is streaming's own, and a later `import streaming` gets all packages and their attributes."""
    code = """if True:
        import sys
        from mythos_dist.data.windows import import_reader

        reader = import_reader()
        print(reader.__module__, {name.partition(".")[0] for name in sys.modules} & {"streaming", "transformers"})
        import streaming

        packages = streaming.base.dataset.StreamingDataset, streaming.base.format.mds.reader.MDSReader
        print(import_reader() is reader, reader in packages)
    """
    assert run(code) == "streaming.base.format.mds.reader set()\nTrue False\n"


def test_threads_can_import_the_shard_reader_concurrently():
    """A second thread once got the placeholder packages that exist during the import."""
    code = """if True:
        from concurrent.futures import ThreadPoolExecutor
        from mythos_dist.data.windows import import_reader

        with ThreadPoolExecutor(8) as pool:
            readers = [pool.submit(import_reader) for _ in range(8)]
        print(len({reader.result() for reader in readers}))
    """
    assert run(code) == "1\n"
