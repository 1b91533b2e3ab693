"""DeepSpeed's data parallelism against one process without DeepSpeed."""

import dataclasses

import pytest
import torch
from helpers.launch import run_ranks

from mythos_dist.config.schema import Config
from mythos_dist.data.stream import MicroBatch, ReplicaStream
from mythos_dist.model import Mythos

STEPS = 4
pytestmark = pytest.mark.launch


def replace(config: Config, **sections: dict) -> Config:
    """A copy with some fields of some sections changed."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def open_stream(config: Config, replica: int, num_replicas: int) -> ReplicaStream:
    return ReplicaStream(
        config.data.path,
        "train",
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        replica=replica,
        num_replicas=num_replicas,
        seed=0,
    )


def train_plainly(config: Config) -> dict:
    """The run on one process with torch alone: the whole global batch, AdamW as its paper says, the sign rule."""
    from mythos_dist.train.schedule import learning_rate

    model = Mythos(config.model, experts=config.experts, seed=config.run.seed)
    stream = open_stream(config, 0, 1)
    o = config.optim
    decays = {  # by hand: matrices of attention, FFNs, experts, router and the depth LoRA
        name
        for name, p in model.named_parameters()
        if p.dim() >= 2 and not name.startswith(("embed", "recurrent.act", "recurrent.lora.scale"))
    }
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decays], "weight_decay": o.weight_decay},
        {"params": [p for n, p in model.named_parameters() if n not in decays], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps)
    bias = model.recurrent.block.ffn.router.bias
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        batches = stream.step(step - 1)
        tokens = MicroBatch(*(torch.cat(field) for field in zip(*batches, strict=True)))
        out = model(tokens.input_ids, labels=tokens.labels, document_ids=tokens.document_ids)
        out["objective"].backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step, config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        load = out["expert_counts"].sum(0).double()
        bias += config.experts.bias_update_rate * torch.sign(load.mean() - load).float()
        losses.append(float(out["cross_entropy"]))
    return {"loss": losses, "grad_norm": norms, "state": model.state_dict()}


def train_under_deepspeed(configs: list[Config]) -> list[dict]:
    """On each rank: the same run through our engine, once per config."""
    import deepspeed
    import torch.distributed as dist

    from mythos_dist.train.engine import Engine

    results = []
    for config in configs:
        engine = Engine(config)
        stream = open_stream(config, dist.get_rank(), dist.get_world_size())
        steps = [engine.train_step(stream.step(step - 1), step) for step in range(1, STEPS + 1)]
        with deepspeed.zero.GatheredParameters(list(engine.model.parameters())):
            state = {name: value.detach().clone() for name, value in engine.model.state_dict().items()}
        results.append(
            {
                "loss": [s.loss for s in steps],
                "grad_norm": [s.grad_norm for s in steps],
                "counts": [s.expert_counts for s in steps],
                "skipped": [s.skipped for s in steps],
                "state": state,
            }
        )
        engine.deepspeed.destroy()
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_every_zero_stage_equals_one_process_without_deepspeed(config, world):
    """fp32, accumulation, clipping that bites, weight decay, document masks, moving bias: sums differ in order only.

    AdamW divides by sqrt(v), so a difference of 1e-7 in a tiny gradient may grow: parameters are compared to 1e-4.
    """
    base = replace(config, train={"global_batch": 8, "micro_batch": 1}, experts={"bias_update_rate": 0.01})
    expected = train_plainly(base)
    assert min(expected["grad_norm"]) > base.optim.grad_clip, "clipping must bite"
    configs = [replace(base, parallel={"zero": zero}) for zero in (1, 2, 3)]
    for ranks in zip(*run_ranks(world, train_under_deepspeed, configs), strict=True):
        for got in ranks:
            assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
            for name, value in expected["state"].items():
                torch.testing.assert_close(
                    got["state"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
        k = base.model.n_experts_per_tok * base.train.seq_len * base.train.global_batch
        assert all(counts.sum(1).tolist() == [k] * base.model.max_loop_iters for counts in ranks[0]["counts"])


def test_bf16_and_fp16_follow_fp32(config):
    """Half precision under every ZeRO stage: losses near fp32's, and a router bias that nothing has rounded."""
    base = replace(config, train={"global_batch": 8, "micro_batch": 2}, experts={"bias_update_rate": 0.001})
    expected = train_plainly(base)
    cases = [(dtype, zero) for dtype in ("bf16", "fp16") for zero in (1, 2, 3)]
    configs = [replace(base, train={"dtype": dtype}, parallel={"zero": zero}) for dtype, zero in cases]
    for (dtype, zero), got in zip(cases, run_ranks(2, train_under_deepspeed, configs)[0], strict=True):
        assert got["loss"][0] == pytest.approx(expected["loss"][0], rel=1e-3), (dtype, zero)
        assert got["loss"] == pytest.approx(expected["loss"], rel=2e-2), (dtype, zero)
        steps = got["state"]["recurrent.block.ffn.router.bias"] / base.experts.bias_update_rate
        torch.testing.assert_close(
            steps, steps.round(), atol=1e-3, rtol=0
        )  # whole multiples of the rate: nothing rounded off
        assert steps.abs().max() > 0
