"""Products of a few rows: the values of `F.linear`, by another product only in inference and where it is faster."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mythos_dist.parallel.few_rows import MOST_ROWS, few_rows_linear

INPUTS, OUTPUTS = 160, 256


class _Products(TorchDispatchMode):
    """The shapes of both factors of each product that is computed as one of two matrices."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.shapes.append([tuple(tensor.shape) for tensor in args])
        return func(*args, **(kwargs or {}))


def _inputs(*shape: int, outputs: int = OUTPUTS, bias: bool = False, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(*shape, generator=draw), torch.randn(outputs, shape[-1], generator=draw)
    return x.to(dtype), weight.to(dtype), torch.randn(outputs, generator=draw).to(dtype) if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(), (0,), (1,), (2,), (3,), (1, 1), (2, 3), (MOST_ROWS,), (MOST_ROWS + 1,)])
@torch.inference_mode()
def test_values_and_shapes_are_those_of_f_linear(rows, bias):
    x, weight, offset = _inputs(*rows, INPUTS, bias=bias)
    strided = torch.stack([x, x], -1)[..., 0]
    for one, matrix in ((x, weight), (x, weight.t().contiguous().t()), (strided, weight)):
        y = few_rows_linear(one, matrix, offset)
        torch.testing.assert_close(y, F.linear(x, matrix, offset), atol=1e-4, rtol=1e-5)
        assert y.is_contiguous() or rows == (1,)  # the first of two rows: no copy


@pytest.mark.parametrize("rows, columns", [(1, 2), (2, 2), (MOST_ROWS, MOST_ROWS)])
def test_the_weight_is_the_first_factor_in_inference_mode_and_a_single_row_is_doubled(rows, columns):
    x, weight, _ = _inputs(rows, INPUTS)
    with torch.inference_mode(), _Products() as products:
        few_rows_linear(x, weight)
    assert products.shapes == [[(OUTPUTS, INPUTS), (INPUTS, columns)]]


@pytest.mark.parametrize(
    "rows, inputs, outputs, mode, dtype",
    [
        pytest.param(MOST_ROWS + 1, INPUTS, OUTPUTS, torch.inference_mode, torch.float32, id="many rows"),
        pytest.param(3, 2048, OUTPUTS, torch.inference_mode, torch.float32, id="wide rows"),
        pytest.param(2, INPUTS, 16, torch.inference_mode, torch.float32, id="a small weight"),
        pytest.param(2, INPUTS, OUTPUTS, torch.inference_mode, torch.bfloat16, id="bf16"),
        pytest.param(2, INPUTS, OUTPUTS, torch.no_grad, torch.float32, id="no gradient"),
        pytest.param(2, INPUTS, OUTPUTS, torch.enable_grad, torch.float32, id="with gradient"),
    ],
)
def test_other_products_are_those_of_f_linear(rows, inputs, outputs, mode, dtype):
    """Also without gradient: the recomputed forward of training has the bits of the first."""
    x, weight, _ = _inputs(rows, inputs, outputs=outputs, dtype=dtype)
    with mode(), _Products() as products:
        y = few_rows_linear(x, weight)
    assert all(first == (rows, inputs) for first, _ in products.shapes) and y.equal(F.linear(x, weight))
