"""Routed experts: E SwiGLU networks as three stacked tensors, dropless, and the backends that compute them.

y[n] = sum over j of weights[n, j] * down_e(silu(gate_e(x[n])) * up_e(x[n])) with e = index[n, j].
The layout is MegaBlocks': (E, F, D) each, `down` transposed, so that `(E * F, D)` is a view. Every expert's parameters
get a gradient, zeros for an expert without tokens: a gradient that is missing on one rank would break its reduction.
"""

# N tokens, D model, E experts, k experts per token, F hidden width of an expert, M rows, at least N * k,
# R rows received from the expert axis.

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import MythosConfig
from mythos_dist.model.chunks import TokenChunks
from mythos_dist.model.gradient_sums import GradientSums
from mythos_dist.model.grouped import grouped
from mythos_dist.model.megablocks import check_megablocks, megablocks
from mythos_dist.model.recompute import checkpoint_if
from mythos_dist.model.swiglu import swiglu_forward
from mythos_dist.parallel.expert import Route, dispatch
from mythos_dist.parallel.few_rows import doubled, few_rows_product, first_row, is_faster
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.process import on_cpu
from mythos_dist.parallel.ranges import in_range
from mythos_dist.parallel.tensor import shard_parameter

MOST_PAIRS = 6  # per expert: of more, `F.grouped_mm` is as fast as `few_pairs`
# (x, weights, index, gate, up, down, pairs) -> y. An index of E is an empty slot; `pairs` is the number of slots that
# are not empty, None if all are used.
Backend = Callable[..., Tensor]


def reference(
    x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor, pairs: int | None = None
) -> Tensor:
    """One expert after the other; tests compare the other backends with it."""
    y = torch.zeros_like(x)
    for e in range(gate.shape[0]):
        token, slot = (index == e).nonzero(as_tuple=True)
        rows = x[token]
        out = (F.silu(rows @ gate[e].T) * (rows @ up[e].T)) @ down[e]
        y = y.index_add(0, token, out * weights[token, slot].to(x.dtype).unsqueeze(-1))
    return y


def few_pairs(x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`reference` for a few tokens in inference mode, with `down` (E, D, F): only experts that have tokens are visited.

    On a CPU `F.grouped_mm` runs a product for every expert, with tokens or without: for one token with 4 of 32 experts,
    96 products instead of 12.
    """
    k = index.shape[1]
    if len(x) == 1 and is_faster(x, gate[0]) and is_faster(x, down[0]):
        return _one_token(x, weights, index, gate, up, down)
    experts, order = index.flatten().sort(stable=True)  # (M,)
    token, scale = order // k, weights.to(x.dtype).flatten()[order]
    runs = [(e, len(list(equal))) for e, equal in groupby(experts.tolist())]  # (expert, pairs)

    def products(rows: Tensor, stack: Tensor) -> Tensor:
        """(M, inputs) -> (M, outputs), each row with its expert's weight of (E, outputs, inputs)."""
        parts = rows.split([pairs for _, pairs in runs])
        return torch.cat([few_rows_product(part, stack[e]) for part, (e, _) in zip(parts, runs, strict=True)])

    rows = x[token]
    hidden = swiglu_forward(products(rows, gate), products(rows, up), scale)  # (M, F)
    return torch.zeros_like(x).index_add_(0, token, products(hidden, down))


def _one_token(x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`few_pairs` of one token (1, D) with fewer operations: its row is doubled once, products with `down` are added to
    one sum."""
    experts, rows = index[0].tolist(), doubled(x)  # k of them, (D, 2)
    products = torch.cat([torch.mm(stack[e], rows) for stack in (gate, up) for e in experts])  # (2 * k * F, 2)
    of_gate, of_up = products[:, 0].view(2, len(experts), -1).unbind()  # (k, F)
    hidden = swiglu_forward(of_gate, of_up, weights[0])
    rows = torch.stack([hidden, hidden], dim=1).transpose(1, 2).unbind()  # (F, 2) of each expert
    total = torch.mm(down[experts[0]], rows[0])  # (D, 2)
    for e, row in zip(experts[1:], rows[1:], strict=True):
        total.addmm_(down[e], row)
    return first_row(total)


BACKENDS: dict[str, Backend] = {"grouped": grouped, "megablocks": megablocks, "reference": reference}


# torch.compile cannot trace GradientSums nor F.grouped_mm on a CPU. `torch.compiler.disable` would import torch._dynamo
# here (`parallel/collectives.py`).
_grouped_on_cpu = torch._disable_dynamo(grouped)


class Experts(nn.Module):
    """The stacked parameters of this rank's routed experts, their backend, and the exchange over the expert axis.

    w1 is gate, w3 up, w2 down, as in DeepSpeed's expert checkpoints. Experts are sharded over the expert axis, their
    hidden width over the tensor axis.
    """

    transposed_down: Tensor | None = None  # (E, D, F), see model/transposed.py

    def __init__(
        self, config: MythosConfig, backend: str, mesh: Mesh, selective: bool = False, chunks: TokenChunks | None = None
    ):
        """Raises UserError if the backend cannot run in this process."""
        super().__init__()
        if backend == "megablocks":
            check_megablocks()
        self.mesh = mesh
        self.selective = selective
        self.in_chunks = chunks is not None and chunks.tokens > 0
        self.n_experts = config.n_experts
        shape = (config.n_experts, config.expert_dim, config.dim)
        axes = {0: mesh.expert, 1: mesh.tensor}
        self.w1 = shard_parameter(shape, axes)
        self.w2 = shard_parameter(shape, axes)
        self.w3 = shard_parameter(shape, axes)
        self.backend = BACKENDS[backend]
        self._sums: GradientSums | None = None

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> tuple[Tensor, Route | None]:
        """x (N, D), full on each tensor rank, weights and index (N, k) -> this rank's partial sums (N, D), and None.

        With several ranks on the expert axis -> the sums (R, D) of the R rows received, and the route for `combine`.
        """
        if self.mesh.expert.size == 1:
            return self._run(x, weights, index, None), None
        received = dispatch(x, weights, index, self.n_experts, self.mesh)
        y = self._run(received.rows, received.weights, received.experts, received.pairs)
        return y, received.route

    def start_pass(self, calls: int) -> None:
        """Call before a forward pass that runs the MoE layer `calls` times with gradient."""
        accumulate = calls > (0 if self.in_chunks else 1) and self.w1.requires_grad and on_cpu(self.w1)
        self._sums = GradientSums() if accumulate else None

    @in_range("experts")
    def _run(self, x: Tensor, weights: Tensor, index: Tensor, pairs: int | None) -> Tensor:
        is_few = pairs is None and index.numel() <= MOST_PAIRS * len(self.w1)
        if is_few and torch.is_inference_mode_enabled() and self.backend is grouped and on_cpu(x):
            down = self.w2.transpose(-2, -1) if self.transposed_down is None else self.transposed_down
            return few_pairs(x, weights, index, self.w1, self.w3, down)
        inputs = x, weights, index, self.w1, self.w3, self.w2, pairs
        if self.backend is grouped and on_cpu(x):
            return checkpoint_if(self.selective, _grouped_on_cpu, *inputs, self._sums)
        return checkpoint_if(self.selective, self.backend, *inputs)
