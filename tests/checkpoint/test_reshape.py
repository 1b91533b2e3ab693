"""A run resumes at any layout: each loads the checkpoint of others bit for bit, and later losses are equal.

In `make test` each of six layouts loads and is loaded by two others; in `make test-all` thirteen, in every ordered
pair. The state at saving and the state after loading are gathered by DeepSpeed's own functions, not by the code that
writes and reads checkpoints.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launch import new_process_groups, run_ranks
from helpers.parity import (
    STD,
    batches,
    change,
    load_checkpoint,
    local_state,
    router_biases,
    routers_of,
    save_checkpoint,
    shard_bounds,
)
from helpers.parity_kinds import replicas_of
from helpers.selection import selected

import mythos_dist.model.init
from mythos_dist.checkpoint.canonical import write_canonical
from mythos_dist.checkpoint.restore import open_checkpoint
from mythos_dist.config.schema import Config

pytestmark = [pytest.mark.launch, pytest.mark.timeout(2400)]

SAVED, STEPS = 2, 4
SHORT: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, dict()),
    "expert 2, zero 2": (2, dict(expert=2, zero=2)),
    "tensor 4": (4, dict(tensor=4)),
    "pipe 2, tensor 2": (4, dict(pipe=2, tensor=2)),
    "context 2, expert 4, zero 3": (4, dict(context=2, expert=4, zero=3)),
    "tensor 2, expert 2, sequence": (4, dict(tensor=2, expert=2, sequence=True)),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **SHORT,
    "zero 3": (2, dict(zero=3)),
    "pipe 2": (2, dict(pipe=2)),
    "context 2, expert 2, zero 3": (2, dict(context=2, expert=2, zero=3)),
    "context 2, pipe 2": (4, dict(context=2, pipe=2)),
    "expert 4, zero 3": (4, dict(expert=4, zero=3)),
    "pipe 4": (4, dict(pipe=4)),
    "pipe 2, tensor 2, expert 2": (8, dict(pipe=2, tensor=2, expert=2)),
}
BIAS = [2.0, 1.0, 0.5, 0.25, 0.0, -0.25, -0.5, -4.0]  # makes the experts' token counts very different


def run_of(config: Config, name: str) -> Config:
    """Widths that no axis divides, another loop count in each step, and a micro-batch size per layout."""
    ranks, parallel = LAYOUTS[name]
    replicas = replicas_of(parallel, ranks)
    return change(
        config,
        model=dict(vocab_size=515, q_lora_rank=18, lora_rank=6, expert_dim=30, max_loop_iters=4, loop_layers=2),
        train=dict(global_batch=4, micro_batch=4 // replicas // (1 if replicas > 2 else 2)),
        experts=dict(bias_update_rate=0.01),
        loops=dict(distribution="poisson", mean=3, maximum=5, backprop=2),
        optim=dict(grad_clip=0.2, eps=1e-6),
        parallel=parallel,
        run=dict(seed=18),
    )


def engine_of(config: Config) -> Any:
    from mythos_dist.parallel.mesh import build_mesh
    from mythos_dist.train.engine import Engine

    mythos_dist.model.init.STD = STD
    return Engine(config, build_mesh(config.parallel))


def train(engine: Any, config: Config, steps: range) -> dict[str, list[float]]:
    mesh = engine.mesh
    every = zip(range(1, steps.stop), batches(config, mesh.data.rank, mesh.data.size), strict=False)
    results = [engine.train_step(mine, step) for step, mine in every if step in steps]
    return {"loss": [step.loss for step in results], "grad_norm": [step.grad_norm for step in results]}


def bias_of(engine: Any) -> torch.Tensor | None:
    return router_biases(engine.model)


def write(configs: list[Config], folders: list[str]) -> list[dict[str, Any]]:
    """On each rank: train, save, continue training."""
    import torch.distributed as dist

    results = []
    for config, folder in zip(configs, folders, strict=True):
        new_process_groups(folder)
        engine = engine_of(config)
        if engine.model.stage.has_loops:
            for router in routers_of(engine.model):
                router.bias += torch.tensor(BIAS)
        train(engine, config, range(1, SAVED + 1))
        save_checkpoint(engine, config, folder, SAVED)
        saved = {"places": shard_bounds(engine), "held": local_state(engine), "bias": bias_of(engine)}
        results.append({**saved, "later": train(engine, config, range(SAVED + 1, STEPS + 1))})
        engine.close()
        del engine
        dist.barrier()
    return results


def read(configs: list[Config], folders: list[list[str]], train_on: int | None = None) -> list[list[dict[str, Any]]]:
    """On each rank, for each layout and each of its checkpoints: the state after loading it, and later losses.

    train_on: the number of checkpoints, the first ones, that each layout continues from; None: all.
    """
    import torch.distributed as dist

    results = []
    for i, config in enumerate(configs):
        new_process_groups(f"reader {i}")
        engine = engine_of(change(config, run=dict(seed=99)))
        engine.config = config
        states = []
        for j, folder in enumerate(folders[i]):
            load_checkpoint(engine, folder)
            loaded = {"places": shard_bounds(engine), "held": local_state(engine), "bias": bias_of(engine)}
            if train_on is None or j < train_on:
                loaded["later"] = train(engine, config, range(SAVED + 1, STEPS + 1))
            states.append(loaded)
        results.append(states)
        engine.close()
        del engine
        dist.barrier()
    return results


def by_ranks() -> dict[int, list[str]]:
    return {ranks: [name for name in LAYOUTS if LAYOUTS[name][0] == ranks] for ranks in (1, 2, 4, 8)}


@pytest.fixture(scope="module")
def written(config, tmp_path_factory, request) -> dict[str, dict[str, Any]]:
    """For each layout the folder of its checkpoint, the full tensors at saving, and the losses of later steps. Only
    layouts of SHORT if no selected test asks for more."""
    checkpoints = {}
    wanted = LAYOUTS if True in selected(request, "every_pair") else SHORT
    for ranks, all_names in by_ranks().items():
        if not (names := [name for name in all_names if name in wanted]):
            continue
        folders = [str(tmp_path_factory.mktemp("written")) for _ in names]
        results = run_ranks(ranks, write, [run_of(config, name) for name in names], folders, seconds=1200)
        for i, name in enumerate(names):
            checkpoints[name] = {
                "folder": folders[i],
                "later": results[0][i]["later"],
                **gather([rank[i] for rank in results]),
            }
    return checkpoints


def gather(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Full tensors from the ranks' shards; where several ranks hold the same elements, their bits must be equal."""
    sizes: dict[str, Any] = {}
    for rank in ranks:
        for name, (_, stop) in rank["places"].items():
            sizes[name] = tuple(map(max, stop, sizes.get(name, stop)))
    tensors: dict[str, list[torch.Tensor]] = {}
    for rank in ranks:
        for name, (start, stop) in rank["places"].items():
            place = tuple(slice(*ends) for ends in zip(start, stop, strict=True))
            tensors.setdefault(name, [torch.full(sizes[name], torch.nan) for _ in rank["held"][name]])
            for tensor, part in zip(tensors[name], rank["held"][name], strict=True):
                known = tensor[place]
                assert torch.equal(known.where(~known.isnan(), part), part), f"ranks disagree about {name}"
                tensor[place] = part
    assert not any(tensor.isnan().any() for each in tensors.values() for tensor in each)
    (bias,) = {tuple(rank["bias"].tolist()) for rank in ranks if rank["bias"] is not None}
    return {"tensors": tensors, "bias": bias}


def sources_of(target: str, others: Sequence[str], count: int | None) -> list[str]:
    """The layouts whose checkpoints a layout loads: `count` of those after it, or all, itself last."""
    distances = (1, 4)[:count] if count else range(1, len(others) + 1)
    return [others[(others.index(target) + distance) % len(others)] for distance in distances]


def load_and_compare(
    ranks: int, runs: dict[str, Config], written: dict[str, dict[str, Any]], count: int | None, train_on: int | None
) -> None:
    """Each layout of a number of ranks loads checkpoints of `written`: equal bits, and equal losses of later steps."""
    others = [name for name in written if count is None or name in runs]
    names = [name for name in by_ranks()[ranks] if name in others]
    sources = [sources_of(name, others, count) for name in names]
    folders = [[written[source]["folder"] for source in each] for each in sources]
    results = run_ranks(ranks, read, [runs[name] for name in names], folders, train_on, seconds=1600)
    for i, target in enumerate(names):
        for j, name in enumerate(sources[i]):
            got, source, where = gather([rank[i][j] for rank in results]), written[name], f"{name} -> {target}"
            assert got["bias"] == source["bias"], where
            assert got["tensors"].keys() == source["tensors"].keys(), where
            for tensor, expected in source["tensors"].items():
                assert all(map(torch.equal, got["tensors"][tensor], expected)), f"{where}: {tensor}"
            later = results[0][i][j].get("later")
            assert (later is not None) == (train_on is None or j < train_on)
            if later:
                assert later["loss"] == pytest.approx(source["later"]["loss"], rel=1e-5), where
                assert later["grad_norm"] == pytest.approx(source["later"]["grad_norm"], rel=1e-4), where


@pytest.mark.parametrize(
    ("ranks", "every_pair"),
    [
        *((ranks, False) for ranks in (1, 2, 4)),
        *(pytest.param(ranks, True, marks=pytest.mark.long) for ranks in (1, 2, 4, 8)),
    ],
)
def test_every_layout_loads_others(ranks, every_pair, written, config):
    runs = {name: run_of(config, name) for name in (LAYOUTS if every_pair else SHORT)}
    load_and_compare(ranks, runs, written, *((None, None) if every_pair else (2, 1)))


@pytest.mark.parametrize(
    "chosen",
    [
        ("expert 2, zero 2", "pipe 2", "tensor 2, expert 2, sequence"),
        pytest.param(("one rank", "pipe 2, tensor 2", "expert 2, zero 2", "pipe 4"), marks=pytest.mark.long),
    ],
    ids=["", "more"],
)
def test_momentum_of_muon_is_loaded_at_every_layout(chosen, config, tmp_path):
    """Every ordered pair: equal bits; equal losses of later steps for one pair per layout."""
    runs = {name: change(run_of(config, name), optim=dict(name="muon", muon_lr=1e-3)) for name in chosen}
    folders = {name: str(tmp_path / str(i)) for i, name in enumerate(chosen)}
    written: dict[str, dict[str, Any]] = {}
    for ranks, names in by_ranks().items():
        if names := [name for name in names if name in chosen]:
            results = run_ranks(ranks, write, [runs[n] for n in names], [folders[n] for n in names], seconds=800)
            for i, name in enumerate(names):
                saved = gather([rank[i] for rank in results])
                written[name] = {"folder": folders[name], "later": results[0][i]["later"], **saved}
    for source in written.values():
        for tensor, values in source["tensors"].items():
            assert len(values) == (2 if runs[chosen[1]].optim.uses_muon(tensor) else 3)
    for ranks, names in by_ranks().items():
        if set(names) & set(chosen):
            load_and_compare(ranks, runs, written, None, 1)


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.long), "fp16"])
def test_half_precision_resumes_at_other_zero_stages(dtype, config, tmp_path):
    """The stages have three kinds of optimizers, not all with a loss scale. The fp32 master weights are bitwise equal
    after loading, for every pair; losses, of one pair per stage, differ by half-precision rounding."""
    base = change(run_of(config, "zero 3"), train=dict(dtype=dtype, micro_batch=1))
    runs = [change(base, parallel=dict(zero=1, **dict(pipe=2) if pipe else {})) for pipe in (False, True)]
    runs += [change(base, parallel=dict(zero=zero)) for zero in (2, 3)]
    folders = [str(tmp_path / str(i)) for i in range(len(runs))]
    sources = run_ranks(2, write, runs, folders, seconds=600)
    of_others = [[*folders[i + 1 :], *folders[: i + 1]] for i in range(len(runs))]  # the first is another stage's
    targets = run_ranks(2, read, runs, of_others, 1, seconds=1000)
    for i in range(len(runs)):
        for j in range(len(runs)):
            number = (i + 1 + j) % len(runs)
            got, source = gather([rank[i][j] for rank in targets]), gather([rank[number] for rank in sources])
            assert got["bias"] == source["bias"]
            assert all(all(map(torch.equal, got["tensors"][name], source["tensors"][name])) for name in got["tensors"])
        expected = sources[0][(i + 1) % len(runs)]["later"]["loss"]
        assert targets[0][i][0]["later"]["loss"] == pytest.approx(expected, rel=2e-2)


def test_the_checkpoints_are_a_hard_case(written):
    """Moments differ between experts and from zero; all layouts have the same losses."""
    for source in written.values():
        for _, first, second in (source["tensors"][f"recurrent.block.ffn.experts.w{i}"] for i in (1, 2, 3)):
            norms = [[float(expert.norm()) for expert in moment] for moment in (first, second)]
            assert all(len(set(each)) == 8 for each in norms)
            assert max(norms[0]) > 2 * min(norms[0])
    (loss, *others) = (source["later"]["loss"] for source in written.values())
    assert all(other == pytest.approx(loss, rel=1e-5) for other in others)


@pytest.mark.parametrize("file_bytes", [1, 20_000, 1 << 30])  # a file for each name, a few, one
def test_the_canonical_form_is_bitwise_equal(file_bytes, written, tmp_path):
    """Of a layout with three axes, read by the package safetensors."""
    from safetensors.torch import load_file

    source = written["context 2, expert 4, zero 3"]
    folder = write_canonical(open_checkpoint(Path(source["folder"])), tmp_path / "run", file_bytes=file_bytes)
    stored = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    biases = [stored.pop(f"buffer/recurrent.{layer}.ffn.router.bias").tolist() for layer in ("block", "blocks.1")]
    assert biases[0] + biases[1] == list(source["bias"])
    expected = {
        f"{kind}/{name}": tensor
        for name, tensors in source["tensors"].items()
        for kind, tensor in zip(("parameter", "exp_avg", "exp_avg_sq"), tensors, strict=True)
    }
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in expected.items())
    assert len(list(folder.glob("*.safetensors"))) == {1: len(source["tensors"]) + 2, 1 << 30: 1}.get(
        file_bytes, len(list(folder.glob("*.safetensors")))
    )
    again = open_checkpoint(folder).manifest
    before = open_checkpoint(Path(source["folder"])).manifest
    assert (again.step, again.optimizer, again.config, again.layout) == (
        before.step,
        before.optimizer,
        before.config,
        before.layout,
    )


def test_a_canonical_checkpoint_is_loaded_like_any_other(written, config, tmp_path):
    source = written["context 2, expert 4, zero 3"]
    write_canonical(open_checkpoint(Path(source["folder"])), tmp_path, file_bytes=20_000)
    results = run_ranks(2, read, [run_of(config, "pipe 2")], [[str(tmp_path)]], seconds=400)
    got = gather([rank[0][0] for rank in results])
    assert all(all(map(torch.equal, got["tensors"][name], source["tensors"][name])) for name in source["tensors"])
