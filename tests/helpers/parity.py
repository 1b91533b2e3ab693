"""A few optimizer steps on one process with torch alone, and the same through our engine on the ranks of a layout.

Both start from the same initial values, wide enough that every part of the model moves the loss.

Decisions: PARALLEL-16.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers.launch import new_process_groups

import mythos_dist.model.init
from mythos_dist.config.schema import Config
from mythos_dist.data.stream import MicroBatch, ReplicaStream
from mythos_dist.model import Mythos
from mythos_dist.model.loops import Loops
from mythos_dist.model.mythos import IGNORED
from mythos_dist.model.open_mythos import from_open_mythos, to_open_mythos
from mythos_dist.train.schedule import learning_rate, loops_at, state_seed

STEPS = 3
FIRST_LOSS_SCALE = 2.0**21  # so high that most steps overflow, and halve it
STD = 0.2  # of initial values; with 0.02 routed experts would contribute little to the gradient norm


def change(config: Config, **sections: dict) -> Config:
    """A copy with some fields of some sections changed."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def batches(config: Config, replica: int, num_replicas: int) -> Iterator[list[MicroBatch]]:
    """A replica's micro-batches, step after step: of shards, or of random tokens when no data.path is set.

    data.path="N targets": random tokens with N stored rows of labels, which are unequally many by sequence.
    """
    train, per_replica = config.train, config.train.global_batch // num_replicas
    targets = int(config.data.path.split()[0]) if config.data.path.endswith(" targets") else 0
    if config.data.path and not targets:
        yield from ReplicaStream(
            config.data.path,
            "train",
            seq_len=train.seq_len,
            vocab_size=config.model.vocab_size,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            replica=replica,
            num_replicas=num_replicas,
            seed=0,
        ).steps(0)
    generator = torch.Generator().manual_seed(0)
    shape = (train.global_batch, train.seq_len)
    while True:
        tokens = torch.randint(config.model.vocab_size, (shape[0], shape[1] + 1), generator=generator)
        documents = (torch.rand(shape, generator=generator) < 0.1).cumsum(1).int()
        labels = tokens[:, 1:]
        if targets:
            labels = torch.randint(config.model.vocab_size, (shape[0], targets, shape[1]), generator=generator)
            share = torch.arange(shape[0]).view(-1, 1, 1) / shape[0]  # of labels that count; the first sequence: none
            labels = torch.where(torch.rand(labels.shape, generator=generator) < share, labels, IGNORED)
        whole = MicroBatch(tokens[:, :-1], labels, documents, torch.arange(shape[0]))
        first = replica * per_replica
        yield [
            MicroBatch(*(field[i : i + train.micro_batch] for field in whole))
            for i in range(first, first + per_replica, train.micro_batch)
        ]


def routers_of(model: Mythos) -> list[Any]:
    """Those of the looped layers, in their order."""
    blocks: Any = model.recurrent.blocks
    return [model.recurrent.block.ffn.router, *(layer.ffn.router for layer in blocks.values())]


def router_biases(model: Mythos) -> torch.Tensor | None:
    """All of them, joined; None on a stage without loops."""
    return torch.cat([router.bias for router in routers_of(model)]) if model.stage.has_loops else None


def train_reference(config: Config, bias: list[float] | None = None) -> dict[str, Any]:
    """The run on one process with torch alone: the global batch at once, AdamW, the sign rule for the router bias."""
    model = reference_model(config)
    routers = routers_of(model)
    for router in routers if bias else []:
        router.bias += torch.tensor(bias)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    o = config.optim
    decays = {  # by hand: matrices of attention, FFNs, experts, router and the depth LoRA
        name
        for name, p in model.named_parameters()
        if p.dim() >= 2
        and not name.startswith(("embed", "unembed", "recurrent.act", "recurrent.lora.scale", "recurrent.injection"))
    }
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in decays], "weight_decay": 0.0},
        {"params": [p for n, p in model.named_parameters() if n in decays], "weight_decay": o.weight_decay},
    ]
    muon = Muon(model, decays, config) if o.name == "muon" else None
    optimizer = torch.optim.AdamW(groups[:1] if muon else groups, betas=(o.beta1, o.beta2), eps=o.eps)
    losses, norms, share, n_loops, ids, idle = [], [], [], [], [], []
    for step, micro_batches in zip(range(1, STEPS + 1), batches(config, 0, 1), strict=False):
        tokens = MicroBatch(*(torch.cat(field) for field in zip(*micro_batches, strict=True)))
        loops = reference_loops(config, step, len(tokens.labels))
        out = model(tokens.input_ids, labels=tokens.labels, document_ids=tokens.document_ids, loops=loops)
        out["objective"].backward()
        experts = [p.grad for name, p in model.named_parameters() if ".experts." in name and p.grad is not None]
        norms.append(clip(model, o.grad_clip))
        share.append(float(torch.stack([grad.norm() for grad in experts]).norm() / o.grad_clip))  # they are clipped now
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step, config.train.steps)
        optimizer.step()
        if muon:
            muon.step(learning_rate(dataclasses.replace(o, lr=o.muon_lr), step, config.train.steps))
        model.zero_grad()
        load = out["expert_counts"].sum(0).double()
        for router, own in zip(routers, load.chunk(len(routers)), strict=True):
            router.bias += config.experts.bias_update_rate * torch.sign(own.mean() - own).float()
        losses.append(float(out["cross_entropy"]))
        n_loops.append(loops.n_loops)
        ids.append(sorted(tokens.sample_ids.tolist()))
        idle.append(int((load == 0).sum()))
    moments = reference_moments(model, optimizer, muon.momentum() if muon else {})
    return {
        "loss": losses,
        "grad_norm": norms,
        "expert_share": share,  # of the norm
        "n_loops": n_loops,
        "ids": ids,
        "idle": idle,
        "bias": router_biases(model),
        "initial": initial,
        "final": {name: [p.detach(), *moments[name]] for name, p in model.named_parameters()},
    }


def reference_model(config: Config) -> Mythos:
    """The model on one process, with larger initial values."""
    mythos_dist.model.init.STD = STD
    model = Mythos(
        config.model,
        act=config.act,
        experts=config.experts,
        teacher=config.loops.teacher,
        fixed_point=config.loops.fixed_point,
        seed=config.run.seed,
    )
    mythos_dist.model.init.STD = 0.02
    return model


def reference_loops(config: Config, step: int, size: int) -> Loops:
    """The loops of a global batch of `size` sequences in one pass."""
    loops = loops_at(config, step)
    return Loops(
        loops.n_loops,
        loops.no_grad_loops,
        torch.tensor(loops.depths) if loops.depths else None,
        torch.tensor([state_seed(config.run.seed, step, position) for position in range(size)]),
        config.loops.objective == "per_loop",
    )


def reference_moments(model: Mythos, optimizer: torch.optim.Optimizer, momentum: dict) -> dict[str, list]:
    """The moments of each parameter: one of Muon's, two of AdamW's, zeros if it had no gradient."""
    nothing = torch.zeros(())
    return {
        name: [momentum[name]]
        if name in momentum
        else [optimizer.state[p].get(key, nothing).expand_as(p) for key in ("exp_avg", "exp_avg_sq")]
        for name, p in model.named_parameters()
    }


class Muon:
    """torch.optim.Muon for some parameters of a model, on OpenMythos' matrices: experts one by one, nothing fused.

    It iterates in the precision of the run; torch's rounds to bf16 in any case.
    """

    def __init__(self, model: Mythos, names: set[str], config: Config):
        self.config = config
        self.ours = {name: parameter for name, parameter in model.named_parameters() if name in names}
        theirs = self.unfused({name: parameter.detach() for name, parameter in self.ours.items()})
        self.theirs = {name: torch.nn.Parameter(matrix.clone()) for name, matrix in theirs.items()}
        o = config.optim
        self.optimizer = torch.optim.Muon(
            self.theirs.values(),
            weight_decay=o.weight_decay,
            momentum=o.muon_momentum,
            nesterov=o.muon_nesterov,
            ns_steps=o.muon_ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )

    def unfused(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """By OpenMythos' names; what it does not have as NAME/NUMBER: a depth LoRA per loop, and experts of other
        looped layers than the first."""
        found = {}
        for name, tensor in to_open_mythos(tensors, self.config.model).items():
            whole = tensor.chunk(self.config.model.n_shared_experts, _dim(name)) if _is_fused(name) else tensor
            several = _is_fused(name) or tensor.dim() == 3
            found |= {f"{name}/{i}": one for i, one in enumerate(whole)} if several else {name: tensor}
        return found

    def fused(self, matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse."""
        several = {name.partition("/")[0] for name in matrices if "/" in name}
        joined = {name: [matrices[one] for one in matrices if one.startswith(f"{name}/")] for name in several}
        others = {name: matrix for name, matrix in matrices.items() if "/" not in name}
        whole = {n: torch.cat(each, _dim(n)) if _is_fused(n) else torch.stack(each) for n, each in joined.items()}
        return from_open_mythos({**others, **whole}, self.config.model)

    def step(self, lr: float) -> None:
        gradients = {name: parameter.grad for name, parameter in self.ours.items() if parameter.grad is not None}
        for name, gradient in self.unfused(gradients).items():
            self.theirs[name].grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        in_fp32 = mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)
        with in_fp32 if self.config.train.dtype == "fp32" else contextlib.nullcontext():
            self.optimizer.step()
        with torch.no_grad():
            for name, value in self.fused({n: p.detach() for n, p in self.theirs.items()}).items():
                self.ours[name].copy_(value)

    def momentum(self) -> dict[str, torch.Tensor]:
        """By our names."""
        return self.fused({name: self.optimizer.state[p]["momentum_buffer"] for name, p in self.theirs.items()})


def _is_fused(name: str) -> bool:
    """Whether it has all shared experts of a looped layer that OpenMythos does not have."""
    return ".blocks." in name and ".ffn.shared." in name


def _dim(name: str) -> int:
    """That along which fused shared experts follow one another."""
    return 1 if name.endswith("down.weight") else 0


def clip(model: Mythos, limit: float) -> float:
    """Scale all gradients to a global norm of `limit` where it is larger; returns the norm before.

    In float64: torch's own norm of an fp32 tensor adds up elements one by one on a CPU, and is wrong by 1e-5 for
    a million of them, on some processors already for a hundred thousand (DeepSpeed's ZeRO-1/2/3 goes through float64).
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt())
    for grad in grads:
        grad.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def save_checkpoint(engine: Any, config: Config, folder: str, step: int) -> None:
    """Save as the training loop does after a step, and wait for it. On each rank."""
    from mythos_dist.checkpoint.fence import Fence
    from mythos_dist.checkpoint.manifest import Lineage
    from mythos_dist.checkpoint.save import Saver
    from mythos_dist.train.run_checkpoints import manifest_of

    fence = Fence(Path(folder), 1)
    saver = Saver(Path(folder, "checkpoints"), config.checkpoint, fence, engine.local_shards)
    saver.save(manifest_of(config, step, fence, "", engine, Lineage()))
    assert saver.finish()


def load_checkpoint(engine: Any, folder: str) -> None:
    """Load as the training loop does before its first step. On each rank."""
    from mythos_dist.checkpoint.restore import find_checkpoint, load_state

    checkpoint, damaged = find_checkpoint(Path(folder, "checkpoints"), engine.config.checkpoint)
    assert checkpoint and not damaged
    load_state(checkpoint, engine.local_shards)
    engine.after_load(checkpoint.manifest.optimizer, checkpoint.manifest.step)


def local_state(engine: Any) -> dict[str, list[torch.Tensor]]:
    """Name -> this rank's shards of the parameter and its moments, without padding, gathered by DeepSpeed.
    A collective call."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from mythos_dist.parallel.tensor import shard_of

    def real(parameter: Any, tensor: Any) -> torch.Tensor:
        """The shard without padding; the padding must be zeros."""
        place = shard_of(parameter)
        tensor = tensor.view(parameter.shape if parameter.numel() == tensor.numel() else parameter.ds_shape).clone()
        inner = tensor[tuple(slice(0, size) for size in place.shape)]
        assert tensor.count_nonzero() == inner.count_nonzero(), f"{place}: the padding is not zero"
        return inner.clone()

    if hasattr(engine.ds_engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.ds_engine.optimizer._lazy_init_hp_params_optimizer_state()  # ZeRO-1/2 do it with their first step
    return {
        name: [
            real(p, safe_get_full_fp32_param(p)),
            *(real(p, safe_get_full_optimizer_state(p, kind)) for kind in kinds_of_moments(engine.config, name)),
        ]
        for name, p in engine.model.named_parameters()
    }


def kinds_of_moments(config: Config, name: str) -> tuple[str, ...]:
    """The moments of a parameter, as torch's optimizers name them."""
    return ("momentum_buffer",) if config.optim.uses_muon(name) else ("exp_avg", "exp_avg_sq")


def shard_bounds(engine: Any) -> dict[str, list[tuple[int, ...]]]:
    """Name -> start and stop of this rank's shard in the full tensor."""
    from mythos_dist.parallel.tensor import shard_of

    places = {name: shard_of(p) for name, p in engine.model.named_parameters()}
    return {name: [place.start, place.stop] for name, place in places.items()}


def train_under_deepspeed(
    cases: list[tuple[Config, list[float] | None]], folders: Sequence[str] = (), num_steps: int = STEPS
) -> list[dict[str, Any]]:
    """On each rank: the same run through our engine, once per config. `places` are the bounds of the shards.

    A case with a folder (none: "") saves a checkpoint there after half of the steps, rounded down, and an engine with
    other initial values resumes from it: its results are `resumed`.
    """
    import torch.distributed as dist

    from mythos_dist.parallel.mesh import build_mesh
    from mythos_dist.train.batches import gather_sample_ids
    from mythos_dist.train.engine import Engine

    results = []
    mythos_dist.model.init.STD = STD
    for i, ((config, bias), folder) in enumerate(zip(cases, folders or [""] * len(cases), strict=True)):
        print(config.parallel, config.train, bias, file=sys.stderr)  # a launch that fails says where it was
        new_process_groups(f"case {i}")
        mesh = build_mesh(config.parallel)
        engine = Engine(config, mesh)
        if bias and engine.model.stage.has_loops:
            for router in routers_of(engine.model):
                router.bias += torch.tensor(bias)
        initial = {name: parameter for name, (parameter, *_) in local_state(engine).items()}
        if folder and config.train.dtype == "fp16":
            engine.ds_engine.optimizer.loss_scaler.cur_scale = FIRST_LOSS_SCALE
        steps, ids = [], []
        for step, mine in zip(range(1, num_steps + 1), batches(config, mesh.data.rank, mesh.data.size), strict=False):
            steps.append(engine.train_step(mine, step))
            ids.append(sorted(gather_sample_ids(mine, mesh.data)))
            if folder and step == num_steps // 2:
                save_checkpoint(engine, config, folder, step)
        found = results_of(engine, steps) | {
            "counts": [s.expert_counts.sum(1).tolist() for s in steps],
            "ids": ids,
            "places": shard_bounds(engine),
            "initial": initial,
        }
        engine.close()
        del engine
        dist.barrier()
        if folder:
            found["resumed"] = resume(change(config, run=dict(seed=99)), mesh, folder, config.run.seed, num_steps)
        results.append(found)
    return results


def results_of(engine: Any, steps: list[Any]) -> dict[str, Any]:
    """The values of each step, and the state after the last one."""
    values = {name: [getattr(step, name) for step in steps] for name in ("loss", "grad_norm", "n_loops", "skipped")}
    return values | {"bias": router_biases(engine.model), "final": local_state(engine)}


def resume(config: Config, mesh: Any, folder: str, seed: int, num_steps: int) -> dict[str, Any]:
    """The second half of a run from its checkpoint: losses, norms and the final state."""
    import torch.distributed as dist

    from mythos_dist.train.engine import Engine

    engine = Engine(config, mesh)
    load_checkpoint(engine, folder)
    engine.config = config = change(config, run=dict(seed=seed))  # of loops and dropout
    every = zip(range(1, num_steps + 1), batches(config, mesh.data.rank, mesh.data.size), strict=False)
    steps = [engine.train_step(mine, step) for step, mine in every if step > num_steps // 2]
    found = results_of(engine, steps)
    engine.close()
    dist.barrier()
    return found
