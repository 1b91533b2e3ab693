"""The megablocks backend: MegaBlocks' published code in Triton's interpreter, against float64 written out.

See `helpers/megablocks_cpu.py` for what is real here and what is a mock. On a GPU, `launch/check_gpu.py` is the test.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers.megablocks_cpu import fetch, result_of, start
from helpers.megablocks_worker import STACKS, Case
from helpers.selection import selected
from torch._subclasses.fake_tensor import FakeTensorMode

from mythos_dist.errors import UserError
from mythos_dist.model import megablocks as module

pytestmark = pytest.mark.launch

FP32, BF16 = 1e-5, 1e-2  # relative: dozens of roundings of 2^-24, a few of 2^-9

SPARSE = Case(dim=128, width=128, experts=3, tokens=5, impl="sparse")  # its kernels know whole blocks of 128 only
CASES = [
    *(Case(k=k, experts=9, tokens=6) for k in (1, 2, 5, 8)),
    Case(to=(1, 3)),  # three experts get no token
    Case(k=1, to=(2,)),  # all tokens to one expert
    Case(k=1, experts=1),
    *(Case(dim=dim, width=width) for dim, width in [(31, 17), (5, 1), (130, 129)]),
    Case(k=3, empty=2),
    Case(k=1, empty=1),  # every slot is empty
    Case(tokens=0),
    Case(tokens=0, empty=1),
    Case(strided=True),
    Case(strided=True, empty=3),
    Case(recompute=True),
    Case(recompute=True, empty=3),
    Case(dtype="bfloat16", k=8, experts=9),
    Case(dtype="bfloat16", empty=3),
    Case(dtype="bfloat16", empty=3, half_weights=True),
    Case(dtype="bfloat16", recompute=True),
    Case(dtype="bfloat16", tokens=0),
    replace(SPARSE, k=1, to=(1,)),
    replace(SPARSE, k=3),
    replace(SPARSE, empty=3, recompute=True),
]
SHORT = len(CASES)
CASES += [
    *(Case(k=k, experts=9, tokens=6) for k in (3, 4, 6, 7)),
    Case(dim=4, width=70),
    *(Case(dtype="bfloat16", k=k, experts=9) for k in (1, 2)),
]

SPREAD = [
    Case(experts=4),
    Case(experts=4, width=10),  # 5 on each of two tensor ranks
    Case(experts=4, k=4, tokens=5),
    Case(experts=4, to=(0, 1)),  # with two ranks to an expert group, the second gets no token
    Case(experts=4, k=1, to=(2,)),
    Case(experts=4, recompute=True),
    Case(experts=4, dtype="bfloat16", width=16),
]
WORLD = 4


@pytest.fixture(scope="module")
def sources() -> list[Path]:
    """MegaBlocks and what it imports, as published."""
    try:
        return fetch("megablocks", "stanford-stk", "grouped_gemm")
    except UserError as error:
        pytest.skip(f"MegaBlocks' sources are not to be had here: {error}")


@pytest.fixture(scope="module")
def on_one_process(sources, request) -> dict:
    """All cases, or those that are not long, in one interpreting process; each test looks at one of them."""
    cases = CASES if len(CASES) - 1 in selected(request, "number") else CASES[:SHORT]
    return result_of(start("one_process", [asdict(case) for case in cases], sources, TRITON_INTERPRET="1"))


def whole_16_bytes(case: Case, tensor: int = 1) -> bool:
    """Whether no row needs padding, with `width` sharded over that many ranks."""
    bytes = 4 if case.dtype == "float32" else 2
    return case.dim * bytes % 16 == 0 and -(-case.width // tensor) * bytes % 16 == 0


@pytest.mark.parametrize(
    "number",
    [*range(SHORT), *(pytest.param(number, marks=pytest.mark.long) for number in range(SHORT, len(CASES)))],
    ids=lambda number: f"{number}-{CASES[number].impl}",
)
def test_megablocks_equals_every_token_through_its_experts(number, on_one_process):
    """Output and all gradients; an expert without tokens gets zeros, and no gradient is missing.

    The grouped GEMMs use our parameters in place: nothing is copied, except for padded widths.
    """
    case, result = CASES[number], on_one_process["cases"][number]
    assert result["missing"] == []
    assert max(result["errors"].values()) < (FP32 if case.dtype == "float32" else BF16), result["errors"]
    assert set(result["errors"]) == {"y", "x", "weights", *STACKS}
    assert result["idle_experts_get_zeros"]
    assert result["same_dtype"]
    assert result["random_numbers_kept"]
    some_rows = case.tokens > 0 and case.empty != 1
    assert result["multiplied"] == (some_rows and case.impl == "grouped")
    if result["multiplied"]:
        assert result["operands_are_parameters"] == whole_16_bytes(case)


def test_megablocks_leaves_no_state(on_one_process):
    """Its list of auxiliary losses is empty after all those forwards, and its own parameters take no memory."""
    assert on_one_process["auxiliary_losses"] == 0
    assert on_one_process["shell_devices"] == ["meta"]


@pytest.mark.parametrize(
    "layouts",
    [[{"expert": 2, "tensor": 2}, {"expert": 4}], pytest.param([{"expert": 2}], marks=pytest.mark.long)],
    ids=str,
)
def test_expert_parallel_megablocks_equals_one_process(layouts, sources, tmp_path):
    """Two ranks to an expert group, times two tensor ranks or alone; four to a group; some get no token.

    Each rank's outputs and gradients against float64 on one process. Which ranks multiplied shows that ranks without
    tokens were among them.
    """
    arguments = {"file": str(tmp_path / "store"), "world": WORLD, "layouts": layouts}
    arguments["cases"] = [asdict(case) for case in SPREAD]
    results = result_of(start("several_ranks", arguments, sources, TRITON_INTERPRET="1"))
    assert len(results) == WORLD * len(layouts) * len(SPREAD)
    for one in results:
        tolerance = FP32 if one["case"]["dtype"] == "float32" else BF16
        assert max(one["errors"].values()) < tolerance, one
        if one["multiplied"]:
            aligned = whole_16_bytes(Case(**one["case"]), one["layout"].get("tensor", 1))
            assert one["operands_are_parameters"] == aligned, one
    idle = {(json.dumps(one["layout"]), one["rank"]) for one in results if not one["multiplied"]}
    for layout in (json.dumps(layout) for layout in layouts if layout["expert"] == 2):
        assert {rank for of, rank in idle if of == layout} == {0, 1, 2, 3}


def as_on_a_gpu(launch: dict) -> dict:
    """A launch that was noted in fp32 as it would be in bf16, at a width as in a real model."""
    types = launch["signature"].values()
    change = {} if "*bf16" in types else {"*fp32": "*bf16"}
    constants = dict(launch["constants"])
    if "NUM_COLUMNS" in constants:
        constants |= {"NUM_COLUMNS": 2048, "TOP_K": min(constants["TOP_K"], 2)}
    return launch | {
        "signature": {name: change.get(type, type) for name, type in launch["signature"].items()},
        "constants": constants,
    }


@pytest.mark.long  # they are MegaBlocks' own kernels; the cases above run them
def test_the_kernels_compile_for_a_gpu(sources, on_one_process, tmp_path):
    """Every kind of launch that the cases above made becomes machine code for sm_90: an ELF file of some size."""
    launches = []
    for launch in map(as_on_a_gpu, on_one_process["launches"]):
        if launch not in launches:
            launches.append(launch)
    kernels = result_of(start("compile_ahead", launches, sources, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)))
    names = {"_padded_copy", "_padded_copy_wgrad", "_sdd_kernel", "_dsd_kernel", "_row_indices_kernel"}
    assert {one["kernel"] for one in kernels} == names
    assert all(one["elf"] and one["target"] == 90 for one in kernels)


def test_a_missing_package_raises_with_instructions(monkeypatch):
    """No silent fallback: the error has the setting, the reason, both remedies, and that there is no GPU."""
    monkeypatch.setattr(module, "unavailable", lambda package: f"{package}_ops cannot be imported (no such module)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError) as caught:
        module.check_megablocks()
    missing, no_gpu = caught.value.problems
    assert "experts.backend=megablocks" in missing
    assert "megablocks_ops cannot be imported (no such module)" in missing
    assert "launch/install_gpu.sh" in missing
    assert "experts.backend=grouped" in missing
    assert "GPU" in no_gpu

    monkeypatch.setattr(module, "unavailable", lambda package: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module.check_megablocks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu_only_bf16_is_accepted(dtype):
    """Before anything is launched; the tensors are fake CUDA tensors."""
    with FakeTensorMode(), pytest.raises(UserError, match=r"bf16 only.*set train\.dtype=bf16"):
        x, stack = torch.empty(3, 8, dtype=dtype, device="cuda:0"), torch.empty(2, 4, 8, dtype=dtype, device="cuda:0")
        weights = torch.empty(3, 1, device="cuda:0")
        module.megablocks(x, weights, torch.empty(3, 1, dtype=torch.int64, device="cuda:0"), stack, stack, stack)
