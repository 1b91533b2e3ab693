"""Products of a few rows with a weight on a CPU, as decoding needs: their time is that of reading the weight.

MKL computes x @ weight^T of one row on one thread, and that of a few rows at a third of memory's rate. The same product
as weight @ x^T is two to three times as fast, on all threads, if x has at least two rows, each contiguous, and fits the
innermost cache (`benchmarks/README.md`). A single row is therefore computed twice.

Only in inference mode: training computes no token one by one, and a recomputed forward has the bits of the first.

Decisions: DECODE-9, DECODE-10.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos_dist.parallel.process import on_cpu

MOST_ROWS, MOST_ELEMENTS = 8, 4096  # of x
LEAST_WEIGHT = 1 << 15  # elements: below, what it costs to launch the product counts more


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` up to rounding; perhaps not contiguous if x is (1, inputs)."""
    if not torch.is_inference_mode_enabled() or x.numel() > MOST_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    is_row = x.dim() == 2 and len(x) == 1
    y = few_rows_product(x if is_row else x.reshape(-1, x.shape[-1]), weight)
    if bias is not None:
        y = y + bias
    return y if is_row else y.contiguous().view(*x.shape[:-1], len(weight))


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, inputs) @ weight (outputs, inputs)^T without gradient -> (rows, outputs), perhaps not contiguous."""
    if not is_faster(x, weight):
        return F.linear(x, weight)
    if len(x) == 1:
        return first_row(torch.mm(weight, doubled(x)))
    return torch.mm(weight, x.contiguous().t()).t()


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether weight (outputs, inputs) @ x^T is faster than x (rows, inputs) @ weight^T."""
    rows, inputs = x.shape
    fits = 0 < rows <= MOST_ROWS and max(2, rows) * inputs <= MOST_ELEMENTS and weight.numel() >= LEAST_WEIGHT
    return fits and weight.dtype == torch.float32 and weight.is_contiguous() and on_cpu(weight)


def doubled(x: Tensor) -> Tensor:
    """x (1, inputs) -> (inputs, 2), the second factor of products with weights."""
    return torch.cat([x, x]).t()


def first_row(product: Tensor) -> Tensor:
    """weight @ `doubled(x)` (outputs, 2) -> (1, outputs), a view."""
    outputs = len(product)
    return product.as_strided((1, outputs), (2 * outputs, 2))
