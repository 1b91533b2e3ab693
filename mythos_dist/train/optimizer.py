"""The optimizers: AdamW, and Muon for the matrices of the blocks with AdamW for everything else.

Muon (Jordan et al. 2024) steps along the momentum with all its singular values moved near 1, by a Newton-Schulz
iteration. The update's scale is Moonlight's (Liu et al. 2025), 0.2 * sqrt(max(rows, columns)): its RMS is that of
AdamW's. With `train.dtype=fp32` on one process a step equals `torch.optim.Muon` with adjust_lr_fn="match_rms_adamw"
that iterates in fp32, in half precision it equals torch's as it is, which iterates in bf16.

ZeRO-1 and 2 give an optimizer flat ranges of parameters put end to end. Momentum needs no more than that;
`matrix_exchange.py` brings one full matrix after the other together.

Decisions: OPTIM-1, OPTIM-3, PARALLEL-12.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mythos_dist.config.schema import Config
from mythos_dist.model.matrices import Matrix
from mythos_dist.model.mythos import Mythos
from mythos_dist.model.parameter_groups import parameter_groups
from mythos_dist.parallel.mesh import Mesh
from mythos_dist.parallel.ranges import in_range
from mythos_dist.train.matrix_exchange import GroupLayout, MatrixExchange, exchange_axis

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al., as in torch.optim.Muon
_SMALLEST_NORM = 1e-7
_RMS_OF_ADAMW = 0.2


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """The matrix (rows, columns) with its singular values moved to about 0.7 to 1.2; computed in its dtype."""
    a, b, c = _COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=_SMALLEST_NORM)  # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class SkippableOptimizer(torch.optim.AdamW):
    """AdamW, and Muon for some groups. A step does nothing if `skip()`.

    DeepSpeed calls `step` when the norm of the gradients is known. It is the same on every rank, so all ranks skip the
    step or none does.
    Groups with a `matrix_exchange` are stepped by Muon instead; their one parameter is a rank's range of the group.
    """

    skip: Callable[[], bool] = staticmethod(lambda: False)

    @in_range("optimizer")
    def step(self, closure: Any = None) -> Any:
        """As AdamW's, unless `skip()`. A collective call if there are groups of Muon."""
        if self.skip():
            return None
        for group in self.param_groups:
            if "matrix_exchange" in group:
                self._step_matrices(group)
        return super().step(closure)

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any]) -> None:
        (flat,) = group["params"]
        momentum, nesterov, lr = self.state[flat]["momentum_buffer"], group["nesterov"], group["lr"]
        update = flat.grad  # overwritten: a second tensor of this size would be the largest of the step
        momentum.lerp_(update, 1 - group["momentum"])
        if nesterov:
            update.lerp_(momentum, group["momentum"])
        else:
            update.copy_(momentum)

        def scale(matrix: Matrix) -> float:
            return -lr * _RMS_OF_ADAMW * max(matrix.rows, matrix.columns) ** 0.5

        group["matrix_exchange"].apply(update, lambda matrix: newton_schulz(matrix, group["ns_steps"]), scale)
        # Additions without a factor are rounded alike in and beside vector registers, so copies on stages stay equal.
        flat.mul_(1 - lr * group["weight_decay"]).add_(update)
        flat.grad = None  # AdamW leaves it out


def build_optimizer(model: Mythos, config: Config, mesh: Mesh) -> SkippableOptimizer:
    """The optimizer of a rank's parameters, for DeepSpeed. A collective call if Muon is used."""
    optim = config.optim
    groups = parameter_groups(model, optim, mesh)
    if optim.name == "muon":
        dtype = torch.float32 if config.train.dtype == "fp32" else torch.bfloat16
        replicas = [mesh.data_context, mesh.expert_data] if mesh.expert.size > 1 else [mesh.data_context]
        axes = {axis.name: exchange_axis(mesh, axis) for axis in replicas}
        for group in groups:
            if "muon_spec" in group:
                layout = GroupLayout(group.pop("muon_spec"), config.model, mesh)
                exchange = MatrixExchange(layout, axes[layout.axis.name], dtype)
                group |= {"matrix_exchange": exchange, "nesterov": optim.muon_nesterov}
                group |= {"momentum": optim.muon_momentum, "ns_steps": optim.muon_ns_steps}
    return SkippableOptimizer(
        groups,
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,  # one pass over all elements: on a CPU an eighth of the time of the default
    )
