"""The tensors that one layer of the model passes to the next, and one pipeline stage to the next.

Decisions: PARALLEL-3.
"""

# B batch, S' tokens of each sequence on this rank (S / tensor with sequence parallelism, else S), D model,
# R readouts: the loops so far that are read out, S sequence.

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mythos_dist.config.schema import ActConfig, ExpertsConfig
from mythos_dist.parallel.pipeline import StageSpec

TensorSpecs = dict[str, tuple[torch.Size, torch.dtype]]  # by field of Activations
Readout = tuple[Tensor, Tensor]  # the output if the pass ended here (B, S', D), the weight of its loss (B, S') fp32
UNSET: Any = None  # a field without a tensor at this point of the model


def has_auxiliary_losses(experts: ExpertsConfig, act: ActConfig, fixed_point: float) -> bool:
    """Whether loops add to `Activations.aux_loss`. `fixed_point`: of LoopsConfig."""
    return max(experts.z_loss, experts.sequence_balance_loss, act.ponder_cost, act.kl, fixed_point) > 0


def num_bytes(specs: TensorSpecs) -> int:
    """Size of the tensors together."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in specs.values())


class Activations(NamedTuple):
    """Before the loops only `h` is set. Between loops all fields are, the readouts only if this pass makes any, `kv`
    only if loops share it. After the loops `h`, `aux_loss` and, if there are readouts, `readout_weights` are.

    A NamedTuple, not a dataclass: DeepSpeed's ZeRO-3 hooks look for tensors in tuples, lists and dicts only.
    """

    h: Tensor  # (B, S', D) hidden state. Model input: token ids (B, S). After loops with readouts: (R * B, S', D)
    e: Tensor = UNSET  # (B, S', D) the prelude's output, injected in every loop
    output: Tensor = UNSET  # (B, S', D) fp32, the loops' output so far; fp32 because it may be a sum over 64 loops
    cum_halting: Tensor = UNSET  # (B, S') fp32, cumulative halting probability
    aux_loss: Tensor = UNSET  # (1,) fp32, sum so far; each loop adds 1 / n_loops of its routers' losses
    kv: Tensor = UNSET  # (B, S, W) keys and values that the next loops share; `shared_kv_shape` has W
    readouts: Tensor = UNSET  # (R, B, S', D) the output if the pass ended after each of these loops
    readout_weights: Tensor = UNSET  # (R, B, S') fp32, weight of each readout's loss

    def with_readouts(self, new: list[Readout]) -> "Activations":
        """With those of further loops appended."""
        if not new:
            return self
        readouts, weights = (torch.stack(tensors) for tensors in zip(*new, strict=True))
        if self.readouts is not None:
            readouts, weights = torch.cat([self.readouts, readouts]), torch.cat([self.readout_weights, weights])
        return self._replace(readouts=readouts, readout_weights=weights)

    def flatten(self) -> tuple[Tensor, ...]:
        """The tensors that are set, in the order of the fields."""
        return tuple(tensor for tensor in self if tensor is not None)

    @classmethod
    def unflatten(cls, tensors: Iterable[Tensor], specs: TensorSpecs) -> "Activations":
        """The inverse of `flatten`; `specs` names the tensors."""
        return cls(**dict(zip(specs, tensors, strict=True)))


def stage_input_shapes(
    stage: StageSpec, hidden_shape: torch.Size, dtype: torch.dtype, readouts: int, kv_shape: torch.Size | None
) -> TensorSpecs:
    """The tensors that the pipeline stage `stage` receives, in the order of the fields.

    hidden_shape: (B, S', D). readouts: the number made by earlier stages. kv_shape: (B, S, W), if loops share keys and
    values.
    """
    B, tokens, D = hidden_shape
    scalar, readout_weights = torch.Size([1]), torch.Size([readouts, B, tokens])
    if stage.after_loops:
        specs = {"h": (torch.Size([max(1, readouts) * B, tokens, D]), dtype), "aux_loss": (scalar, torch.float32)}
    elif stage.has_loops and not stage.starts_loops:
        specs = {
            "h": (hidden_shape, dtype),
            "e": (hidden_shape, dtype),
            "output": (hidden_shape, torch.float32),
            "cum_halting": (hidden_shape[:2], torch.float32),
            "aux_loss": (scalar, torch.float32),
        }
        if kv_shape is not None:
            specs["kv"] = (kv_shape, dtype)
        if readouts:
            specs["readouts"] = (torch.Size([readouts, *hidden_shape]), dtype)
    else:
        return {"h": (hidden_shape, dtype)}
    if readouts:
        specs["readout_weights"] = (readout_weights, torch.float32)
    return specs
