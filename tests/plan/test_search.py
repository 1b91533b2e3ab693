"""The planner: its best layout against brute force, its errors and its output."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mythos_dist.config.layout import layout_problems
from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config
from mythos_dist.errors import UserError
from mythos_dist.model.parameter_table import local_parameters
from mythos_dist.ops.plan.clusters import Cluster, load_cluster
from mythos_dist.ops.plan.estimate import Estimate, with_layout
from mythos_dist.ops.plan.length import longest_length, what_helps
from mythos_dist.ops.plan.search import candidates, search, smallest_cluster

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
CLUSTERS = CONFIGS / "clusters"
H100 = load_cluster(CLUSTERS / "h100_80gb.yaml")


def config_of(variant: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{variant}.yaml", ["data.path=shards", "train.micro_batch=1", *overrides])


def test_layouts_divide_every_batch_of_a_ramp():
    """12, 16 and 32 sequences: at most 4 replicas x sequences per micro-batch, and all of 1, 2 and 4 occur."""
    config = config_of("1b", "train.global_batch=32", "train.batch_ramp=[[12,10],[16,10]]")
    per_pass = set()
    for first, micro_batches in candidates(config, 8, {"recompute": "none", "expert": 1}):
        for micro_batch in micro_batches:
            tried = with_layout(first, micro_batch=micro_batch)
            assert layout_problems(tried) == layout_problems(tried, 8) == []
            per_pass.add(micro_batch * 8 // (first.parallel.tensor * first.parallel.pipe))
    assert per_pass == {1, 2, 4}


@pytest.mark.parametrize(
    ("variant", "gpus", "overrides"),
    [
        ("1b", 8, ["train.global_batch=32"]),
        pytest.param("10b", 16, ["train.global_batch=64", "train.seq_len=4096"], marks=pytest.mark.long),
        ("50b", 16, ["train.global_batch=32", "train.seq_len=4096", "loops.backprop=8"]),
    ],
)
def test_the_best_layout_equals_brute_force(variant, gpus, overrides):
    """Every combination of powers of two that the config's rules allow is estimated."""
    config = config_of(variant, *overrides)
    powers = [1, 2, 4, 8, 16, 32]
    fastest, fitting = float("inf"), 0
    for tensor, expert, pipe, micro_batch in itertools.product(powers, powers, powers[:5], powers):
        for zero, sequence, recompute in itertools.product((1, 2, 3), (False, True), ("none", "selective", "loop")):
            if sequence and tensor == 1:
                continue  # the same layout as without
            layout = dict(tensor=tensor, expert=expert, pipe=pipe, zero=zero, sequence=sequence)
            tried = with_layout(config, **layout, micro_batch=micro_batch, recompute=recompute)
            if gpus % (tensor * pipe) or layout_problems(tried) or layout_problems(tried, gpus):
                continue
            estimate = Estimate(tried, gpus, H100)
            if zero == 3 and _recurrent_elements(tried) >= 1_000_000_000:
                continue  # would be gathered again in every loop: the planner does not try it
            if estimate.fits:
                fitting += 1
                fastest = min(fastest, estimate.step_seconds)
    assert fitting > 10
    assert search(config, gpus, H100, {}).best[0].step_seconds == fastest


def _recurrent_elements(config: Config) -> int:
    parameters = local_parameters(config.model, config.parallel.tensor, config.parallel.expert)
    return sum(parameter.numel for parameter in parameters if parameter.name.startswith("recurrent"))


def test_a_run_that_does_not_fit_gets_the_smallest_cluster():
    """1t needs more than 64 H100: a search finds a layout on the suggested cluster, and none on half of it."""
    config = config_of("1t", "train.seq_len=4096", "train.global_batch=4096")
    result = search(config, 64, H100, {})
    assert not result.best and result.smallest is not None and not result.smallest.fits
    smallest = smallest_cluster(config, 64, H100, {})
    assert smallest and search(config, smallest, H100, {}).best
    assert not search(config, smallest // 2, H100, {}).best


LAYOUT = dict(tensor=16, context=1, expert=1, pipe=1, zero=2, sequence=True, micro_batch=1, recompute="loop")


def test_pieces_and_host_memory_are_tried_where_nothing_else_fits():
    """100b with 131,072 tokens on 1,024 H100: not without pieces. A shorter sequence has none. Saved states that are
    larger than the nodes' memory do not fit."""
    config = config_of("100b", "train.seq_len=131072", "train.global_batch=1024")
    assert not search(config, 1024, H100, {**LAYOUT, "chunk_tokens": 0, "offload": "saved"}).best
    best = search(config, 1024, H100, LAYOUT).best[0]
    assert best.fits and best.config.chunk_size > 0
    short = search(with_layout(config, seq_len=8192), 1024, H100, LAYOUT).best[0]
    assert not short.config.train.chunk_tokens and short.config.train.offload == "none"

    offloaded = Estimate(with_layout(best.config, chunk_tokens=2048, offload="saved"), 1024, H100)
    assert offloaded.fits and offloaded.host > 0
    per_node = 8 * offloaded.host / 1e9
    assert not replace(offloaded, cluster=replace(H100, host_memory_gb=per_node)).fits
    assert replace(offloaded, cluster=replace(H100, host_memory_gb=2 * per_node)).fits
    on_device = search(config, 1024, replace(H100, host_memory_gb=1.0), {**LAYOUT, "expert": 2}).best[0]
    assert on_device.config.train.offload == "none"


def test_the_time_of_copies_shows_where_they_take_longer_than_the_work():
    config = config_of("100b", "train.seq_len=131072", "train.global_batch=1024")
    config = with_layout(config, **LAYOUT, chunk_tokens=2048, offload="saved")
    fast, slow = (Estimate(config, 1024, replace(H100, host_gb_per_s=rate)) for rate in (64.0, 0.01))
    assert fast.seconds["offload"] == 0
    # Forward and back, 16 micro-batches, less the work beside them.
    copies = 2 * 16 * slow.host / (0.01e9 * H100.link_efficiency)
    work = sum(fast.seconds[part] for part in ("matmuls", "router", "memory", "tensor", "expert"))
    assert slow.seconds["offload"] == pytest.approx(copies - work)


def test_where_the_length_is_why_nothing_fits_the_longest_that_fits_is_reported(run):
    """It fits in the reported layout, and a thirty-second more of the next shorter power of two does not."""
    config = config_of("100b", "train.seq_len=524288", "train.global_batch=1024")
    assert not search(config, 1024, H100, LAYOUT).best
    longest = longest_length(config, 1024, H100, LAYOUT)
    assert longest is not None and longest.fits
    seq_len = longest.config.train.seq_len
    power = 1 << (seq_len.bit_length() - 1)
    saving = dict(chunk_tokens=2048, offload="saved")
    longer = with_layout(longest.config, seq_len=seq_len + power // 32, **saving)
    assert 131072 <= seq_len < 524288 and not Estimate(longer, 1024, H100).fits
    fixed = [f"{name}={str(value).lower()}" for name, value in LAYOUT.items()]
    size = ["--seq-len", "524288", "--gpus", "1024", "--global-batch", "1024"]
    printed = run("--variant", "100b", *size, "--fixed", *fixed, code=1)
    assert f"{seq_len:,} tokens fit on these GPUs, 524,288 tokens do not" in printed
    assert "what helps at 524,288 tokens, each alone: parallel.context=" in printed and "(--fixed context=1)" in printed


def test_what_helps_where_the_length_is_why_fits_and_a_little_less_does_not():
    """100b on 1,024 H100: another value of a fixed axis, a degree of context that is slow, fewer loops with gradient,
    more host memory."""

    def helps(tokens: int, cluster: Cluster = H100, **fixed: Any) -> tuple[Config, Estimate, list[str]]:
        config = config_of("100b", f"train.seq_len={tokens}", "train.global_batch=1024")
        smallest = search(config, 1024, cluster, fixed).smallest
        assert smallest is not None and not smallest.fits
        return config, smallest, what_helps(config, 1024, cluster, fixed, smallest)

    config, _, lines = helps(524288, **LAYOUT)
    context = int(re.fullmatch(r"parallel.context=(\d+) \(--fixed context=1\)", lines[0])[1])  # type: ignore[index]
    assert search(config, 1024, H100, {**LAYOUT, "context": context}).best

    small = replace(H100, host_memory_gb=1.0)
    _, smallest, lines = helps(131072, small, **LAYOUT)
    assert f"nodes with more host memory ({smallest.host / 1e9:.0f} GB per GPU" in lines[-1]
    most = next(int(found[1]) for line in lines if (found := re.match(r"loops.backprop=(\d+)", line)))

    def fits(backprop: int) -> bool:
        loops = replace(smallest.config.loops, backprop=backprop)
        tried = replace(smallest.config, loops=loops)
        saving = itertools.product((None, 16384, 2048), ("none", "saved"))
        return any(Estimate(with_layout(tried, chunk_tokens=c, offload=o), 1024, small).fits for c, o in saving)

    assert fits(most) and not fits(most + 1)

    config = config_of("100b", "train.seq_len=16384", "train.global_batch=1024")
    tiny, needed = replace(H100, memory_gb=10.0), {}
    for context in (2, 4):
        result = search(config, 1024, tiny, {**LAYOUT, "context": context})
        assert result.smallest is not None
        needed[context] = result.smallest.largest_stage.bytes / 1e9
    between = replace(H100, memory_gb=sum(needed.values()) / 2 + H100.reserved_gb)
    _, _, lines = helps(16384, between, **{name: value for name, value in LAYOUT.items() if name != "context"})
    assert "parallel.context=4" in lines, "which leaves ranks fewer tokens than a search tries"


def test_a_larger_nvlink_domain_never_makes_a_step_slower():
    """Domains of 8, 32 and 64 GPUs, all else equal."""
    config = config_of("500b", "parallel.tensor=32", "parallel.expert=8")
    seconds = [Estimate(config, 512, replace(H100, nvlink_domain=domain)).step_seconds for domain in (8, 32, 64)]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]


@pytest.fixture
def run(plan, monkeypatch) -> Callable[..., str]:
    """A function: arguments -> the tool's standard output; with code 2 its standard error."""
    monkeypatch.chdir(REPOSITORY)

    def run(*arguments: str, code: int = 0) -> str:
        ended, out, err = plan(*arguments)
        assert ended == code, out + err
        assert "Traceback" not in err
        return err if code == 2 else out

    return run


def test_table_and_json_show_the_same_layouts(run):
    arguments = ["--variant", "10b", "--gpus", "16", "--seq-len", "4096", "--global-batch", "64", "--top", "3"]
    table, printed = run(*arguments), json.loads(run(*arguments, "--json"))
    rows = [line for line in table.splitlines() if re.match(r" +\d+ +\d+ +\d+", line)]
    assert len(rows) == len(printed["layouts"]) == 3
    for row, layout in zip(rows, printed["layouts"], strict=True):
        shown = row.split()
        assert [int(number) for number in shown[:5]] == [
            layout["layout"][name] for name in ("tensor", "expert", "pipe", "data", "zero")
        ]
        assert f"{layout['memory_total'] / 1e9:.1f}" in shown
        assert layout["fits"] and layout["memory_total"] == pytest.approx(sum(layout["memory_bytes"].values()), abs=9)
    assert "pipeline stages" in table


def test_the_output_is_json_when_the_layout_does_not_fit(run):
    overrides = ["parallel.tensor=1", "parallel.sequence=false"]
    arguments = ["configs/10b.yaml", *overrides, "--gpus", "8", "--as-is", "--json"]
    printed = json.loads(run(*arguments, code=1))
    assert not printed["fits"] and printed["layouts"][0]["memory_total"] > H100.usable


def test_a_written_config_gives_the_same_plan(run, tmp_path):
    """It loads and gives the same plan; its folder is created, and an existing file is not overwritten."""
    path = tmp_path / "new" / "planned.yaml"
    arguments = ["--variant", "3b", "--gpus", "8", "--global-batch", "64", "--top", "1", "--write", str(path)]
    layout = json.loads(run(*arguments, "--json"))["layouts"][0]
    config = load_config(path, ["data.path=shards"])
    assert Estimate(config, 8, H100).step_seconds == pytest.approx(layout["step_seconds"])
    before = path.read_text()
    assert "--write" in run(*arguments, code=2) and path.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variant", "1b", "--gpus", "61"], ["--gpus 61", "32 or 64"]),
        (["--variant", "1x", "--gpus", "8"], ["--variant 1x", "did you mean 1", "1b, 3b"]),
        (["--gpus", "8"], ["give a config file or --variant"]),
        (["--variant", "1b", "--gpus", "8", "--seq-len", "8192"], ["train.seq_len=8192", "4096"]),
        (["--variant", "1b", "--gpus", "8", "--fixed", "zero=2", "pipe=2"], ["parallel.zero=2", "parallel.pipe=2"]),
        (["--variant", "1b", "--gpus", "8", "--fixed", "tensor=2", "tensor=4"], ["contradict"]),
        (["--variant", "1b", "--gpus", "8", "--fixed", "tensor=3"], ["model.n_heads=16", "[2, 4]"]),
        (["--variant", "1b", "--gpus", "8", "--cluster", "configs/h1000.yaml"], ["no cluster file", "h100_80gb.yaml"]),
    ],
)
def test_an_error_is_one_line_with_the_nearest_valid_values(run, arguments, words):
    printed = run(*arguments, code=2)
    assert len(printed.strip().splitlines()) == 1
    for word in words:
        assert word in printed


@pytest.mark.parametrize("name", ["h100_80gb", "h200_141gb", "gb200_nvl72", "laptop"])
def test_cluster_files_of_the_repository_load(name):
    old = CONFIGS / f"{name}.yaml"  # where it was in version 0.1
    assert load_cluster(old) == load_cluster(CLUSTERS / f"{name}.yaml")
    assert load_cluster(old).usable > 0


def test_the_former_key_of_a_cluster_file_is_read(tmp_path):
    """`product_efficiency`, as files of earlier versions have it; not beside the new key."""
    text = (CLUSTERS / "laptop.yaml").read_text()
    former = text.replace("matmul_efficiency", "product_efficiency")
    file = tmp_path / "cluster.yaml"
    file.write_text(former)
    assert former != text and load_cluster(file) == load_cluster("laptop")
    file.write_text(former + "\nmatmul_efficiency: 0.5\n")
    with pytest.raises(UserError, match="product_efficiency is the former name of matmul_efficiency; leave it out"):
        load_cluster(file)


def test_all_problems_of_a_cluster_file_are_reported_at_once(tmp_path):
    values = yaml.safe_load((CLUSTERS / "h100_80gb.yaml").read_text())
    del values["fast_gb_per_s"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values | {"memry_gb": 3, "gpus_per_node": "eight", "link_efficiency": 1.5}))
    with pytest.raises(UserError) as caught:
        load_cluster(path)
    message = str(caught.value)
    for part in (
        "memry_gb",
        "did you mean memory_gb?",
        "fast_gb_per_s is missing",
        "gpus_per_node='eight'",
        "at most 1",
    ):
        assert part in message
