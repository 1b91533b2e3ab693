"""Products of a few rows with a weight on a CPU, as decoding needs: their time is that of reading the weight.

MKL computes x @ weight^T of one row on one thread, and that of a few rows at a third of memory's rate. The same product
as weight @ x^T is two to three times as fast, on all threads, if x has at least two rows, each contiguous, and fits the
innermost cache (`benchmarks/README.md`). A single row is therefore computed twice.

Only in inference mode: training computes no token one by one, and a recomputed forward has the bits of the first.

Decisions: DECODE-9.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos_dist.parallel.process import on_cpu

MOST_ROWS, MOST_ELEMENTS = 8, 4096  # of x
LEAST_WEIGHT = 1 << 15  # elements: below, what it costs to launch the product counts more


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` up to rounding."""
    rows = x.shape[:-1].numel()
    if rows > MOST_ROWS or not torch.is_inference_mode_enabled():
        return F.linear(x, weight, bias)
    y = few_rows_product(x.reshape(rows, x.shape[-1]), weight)
    return (y if bias is None else y + bias).contiguous().view(*x.shape[:-1], len(weight))


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, inputs) @ weight (outputs, inputs)^T without gradient -> (rows, outputs), perhaps not contiguous."""
    rows, inputs = x.shape
    fits = 0 < rows <= MOST_ROWS and max(2, rows) * inputs <= MOST_ELEMENTS and weight.numel() >= LEAST_WEIGHT
    if not fits or weight.dtype != torch.float32 or not weight.is_contiguous() or not on_cpu(weight):
        return F.linear(x, weight)
    if rows == 1:
        return torch.mm(weight, torch.cat([x, x]).t()).t()[:1]
    return torch.mm(weight, x.contiguous().t()).t()
