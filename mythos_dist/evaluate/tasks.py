"""Tasks of lm-evaluation-harness: local YAML files with their data beside them, and the names that it ships.

Importing this module imports lm_eval, which takes seconds; `require_harness` says how to install it.
"""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from yaml import YAMLError

from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.errors import UserError, first_line
from mythos_dist.evaluate.harness import HarnessModel
from mythos_dist.evaluate.report import Score
from mythos_dist.evaluate.scorer import Scorer
from mythos_dist.files import real_path

BOOTSTRAP_ITERATIONS = 1000  # of metrics whose standard error has no formula
FEWSHOT_SEED = 1234  # lm_eval's own default
_NAMES = {"task", "group"}  # a YAML file of lm_eval has one of these keys


@dataclass
class Tasks:
    """Loaded tasks, with their data."""

    loaded: Any  # lm_eval's TaskDict: tasks and groups

    def generating(self) -> list[str]:
        """Names of the tasks that need generated text."""
        tasks = self.loaded["tasks"].items()
        return [name for name, task in tasks if task.get_config("output_type") == "generate_until"]


def names() -> list[str]:
    """The tasks and groups that lm_eval ships."""
    manager = TaskManager()
    return sorted({*manager.all_subtasks, *manager.all_groups, *manager.all_tags})


def load_tasks(wanted: Sequence[str]) -> Tasks:
    """Load YAML files, and tasks by name. Raises UserError with all that cannot be loaded."""
    files = [Path(name) for name in wanted if is_file(name)]
    manager = TaskManager(include_defaults=len(files) < len(wanted))
    problems, specs = [], []
    for name in wanted:
        try:
            specs.append(_add_file(Path(name), manager) if is_file(name) else name)
        except Exception as error:  # of YAML, and of functions that it names
            problems.append(f"{name} cannot be read as a task ({_message(error)})")
    if not problems:
        try:
            with _global_random_state():
                loaded = manager.load(specs)
        except KeyError as error:
            problems.append(f"{_message(error)}; --tasks list prints the names; a file's name ends with .yaml")
        except Exception as error:  # of `datasets`, of the file system, of the network
            problems.append(
                f"{', '.join(wanted)} cannot be loaded ({_message(error)}); if it is the data, and without a network, "
                "give a local YAML file with data_files beside it (docs/evaluation.md)"
            )
        else:
            return Tasks(_prepared(loaded))
    raise UserError(problems)


def is_file(name: str) -> bool:
    """Whether a task is given as a file, not by name."""
    return name.endswith((".yaml", ".yml"))


def _add_file(file: Path, manager: TaskManager) -> str:
    """Add the task or group in a YAML file to the manager, for a group also the tasks in files beside it. Returns its
    name."""
    file = real_path(file.expanduser())
    spec = load_yaml(file)
    if not _NAMES & spec.keys():
        raise ValueError("it has neither `task: NAME` nor `group: NAME`")
    specs = [spec]
    for path in sorted(file.parent.glob("*.yaml")) if "group" in spec else []:
        with suppress(ValueError, YAMLError):  # not a task: it may be anything
            if path != file and _NAMES & load_yaml(path, resolve_func=False).keys():
                specs.append(load_yaml(path))
    for one in reversed(specs):  # the given file last, in case that another one has its name
        if entry := TaskIndex.entry_from_config(_with_paths(one, file.parent)):
            manager.task_index[entry.name] = entry
    return spec.get("group") or spec["task"]


def _with_paths(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Data files are beside the YAML file, wherever the evaluation is started."""
    settings = spec.get("dataset_kwargs") or {}

    def resolved(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {key: resolved(value) for key, value in files.items()}
        if isinstance(files, str):
            return files if "://" in files else str(folder / files)
        return [resolved(one) for one in files]

    if "data_files" not in settings:
        return spec
    return {**spec, "dataset_kwargs": {**settings, "data_files": resolved(settings["data_files"])}}


def _prepared(loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """As `lm_eval.simple_evaluate` prepares tasks. Raises UserError for tasks that run code of the model's answers."""
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise UserError(f"{', '.join(unsafe)}: runs code that the model writes, which is not supported; leave it out")
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def evaluate_tasks(tasks: Tasks, scorer: Scorer, tokenizer: Tokenizer, n_loops: int, limit: int | None) -> list[Score]:
    """The metrics of all tasks and groups at one number of loops. limit: the most documents of a task; None: all."""
    model = HarnessModel(scorer, tokenizer, n_loops)
    with _global_random_state(), _one_process():
        options: dict[str, Any] = {"bootstrap_iters": BOOTSTRAP_ITERATIONS, "log_samples": False}
        results = run_harness(model, tasks.loaded, limit=limit, **options)
    results = cast(dict[str, Any], results)
    return [*_scores(results["results"]), *_scores(results.get("groups", {}))]


def _scores(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Score]:
    """lm_eval names values "acc,none" and their errors "acc_stderr,none", with the name of the filter."""
    for task, values in results.items():
        for key, value in values.items():
            metric, _, answer_filter = key.partition(",")
            if not answer_filter or metric.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = values.get(f"{metric}_stderr,{answer_filter}")
            name = metric if answer_filter == "none" else f"{metric} ({answer_filter})"
            yield Score(
                task=task,
                metric=name,
                value=float(value),
                stderr=None if isinstance(stderr, str) or stderr is None else float(stderr),
                samples=int(values.get("sample_len", 0)),
                panel=name,
                line=task,
            )


@contextmanager
def _global_random_state() -> Iterator[None]:
    """Seed the global random numbers that tasks may draw, and restore them: a run's own must not change."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def _one_process() -> Iterator[None]:
    """Bootstrap without a pool of forked processes: this one has threads of gloo and CUDA."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]


def _message(error: Exception) -> str:
    """The first line of an error's message; a KeyError's without quotes."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else first_line(error)
