"""Routed experts: E SwiGLU networks as three stacked tensors, dropless, and the backends that run them.

y[n] = sum over j of weights[n, j] * down_e(silu(gate_e(x[n])) * up_e(x[n])) with e = index[n, j].
Layout is MegaBlocks': (E, F, D) each, `down` transposed, so `(E * F, D)` is a view. Every expert's parameters get a
gradient, zero where no token came: an expert whose gradient is missing on one rank breaks the collective after it.
"""

# N tokens, D model, E experts, k experts per token, F hidden width of an expert, M rows, at least N * k.

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_dist.config.schema import MythosConfig
from mythos_dist.model.gradient_sums import GradientSums
from mythos_dist.model.grouped import grouped
from mythos_dist.model.kernels import on_cpu
from mythos_dist.model.megablocks import check_megablocks, megablocks
from mythos_dist.model.recompute import checkpoint_if
from mythos_dist.parallel.expert import combine, dispatch
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.tensor import shard_parameter

# (x, weights, index, gate, up, down, pairs) -> y. An index of E is an empty slot; `pairs` says how many are not empty,
# None that all are filled.
Backend = Callable[..., Tensor]


def reference(
    x: Tensor, weights: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor, pairs: int | None = None
) -> Tensor:
    """One expert after the other, for tests: what the other backends must equal."""
    y = torch.zeros_like(x)
    for e in range(gate.shape[0]):
        token, slot = (index == e).nonzero(as_tuple=True)
        rows = x[token]
        out = (F.silu(rows @ gate[e].T) * (rows @ up[e].T)) @ down[e]
        y = y.index_add(0, token, out * weights[token, slot].to(x.dtype).unsqueeze(-1))
    return y


BACKENDS: dict[str, Backend] = {"grouped": grouped, "megablocks": megablocks, "reference": reference}


# torch.compile cannot trace the sums, and refuses a CPU's grouped product. `torch.compiler.disable` would import
# torch._dynamo here (`parallel/collectives.py`).
_grouped_on_cpu = torch._disable_dynamo(grouped)


class Experts(nn.Module):
    """The stacked parameters of this rank's routed experts, the backend that runs them, and the way to the others.

    w1 is gate, w3 up, w2 down: the names by which DeepSpeed saves experts. Experts are cut over the expert axis, their
    hidden width over the tensor axis.
    """

    def __init__(self, config: MythosConfig, backend: str, mesh: Mesh, selective: bool = False):
        """Raises UserError if this process cannot run the backend."""
        super().__init__()
        if backend == "megablocks":
            check_megablocks()
        self.mesh = mesh
        self.selective = selective
        self.n_experts = config.n_experts
        shape = (config.n_experts, config.expert_dim, config.dim)
        cuts = {0: mesh.expert, 1: mesh.tensor}
        self.w1, self.w2, self.w3 = (shard_parameter(shape, cuts) for _ in range(3))
        self.backend = BACKENDS[backend]
        self._sums: GradientSums | None = None

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x (N, D) whole, weights and index (N, k) -> this tensor rank's partial sums (N, D)."""
        if self.mesh.expert.size == 1:
            return self._run(x, weights, index, None)
        route = dispatch(x, weights, index, self.n_experts, self.mesh)
        return combine(self._run(route.rows, route.weights, route.experts, route.pairs), route, self.mesh)

    def start_pass(self, loops: int) -> None:
        """Says that the next so many calls belong to one pass through the model, all with a gradient."""
        add_up = loops > 1 and self.w1.requires_grad and on_cpu(self.w1)
        self._sums = GradientSums() if add_up else None

    def _run(self, x: Tensor, weights: Tensor, index: Tensor, pairs: int | None) -> Tensor:
        inputs = x, weights, index, self.w1, self.w3, self.w2, pairs
        if self.backend is grouped and on_cpu(x):
            return checkpoint_if(self.selective, _grouped_on_cpu, *inputs, self._sums)
        return checkpoint_if(self.selective, self.backend, *inputs)
