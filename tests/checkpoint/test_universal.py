"""A program of DeepSpeed's continues our training from an export, and we continue the training of such a program.

The program uses DeepSpeed alone: Mythos as an ordinary module, torch's AdamW and LambdaLR, its own JSON. Both sides see
the same batches, so each must continue as the other one does without the change. Values after loading are gathered by
DeepSpeed's own functions.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.launch import new_process_groups, run_ranks, run_tool
from helpers.parity import STD, batches, change, load_checkpoint, save_checkpoint

import mythos_dist.model.init
from mythos_dist.checkpoint.restore import open_checkpoint
from mythos_dist.config.dump import dump_config
from mythos_dist.config.schema import Config
from mythos_dist.model import Mythos
from mythos_dist.model.loops import Loops
from mythos_dist.train.schedule import learning_rate, loops_at

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]

REPOSITORY = Path(__file__).parents[2]
RANKS, SAVED, STEPS = 2, 2, 4
BIAS = [1.0, 0.5, 0.25, 0.0, 0.0, -0.25, -0.5, -1.0]  # an empty bias would look like one that was lost
STAGES = (1, 2, 3)
LAYOUTS = {"zero 1": dict(zero=1), "zero 2": dict(zero=2), "zero 3": dict(zero=3)}
CASES = {"zero 1": (1, "fp32"), "zero 2": (2, "fp32"), "zero 3": (3, "fp32"), "zero 1, fp16": (1, "fp16")}
# Ours resumes each at another layout than DeepSpeed trained it at.
RESUMED_AT = {"zero 1": dict(zero=3), "zero 2": dict(tensor=2), "zero 3": dict(expert=2), "zero 1, fp16": dict(zero=2)}


def run_of(config: Config, dtype: str = "fp32", **parallel: Any) -> Config:
    """Widths that no axis divides, another loop count in each step, two micro-batches per replica and step."""
    replicas = RANKS // parallel.get("tensor", 1)
    return change(
        config,
        model=dict(vocab_size=515, q_lora_rank=18, lora_rank=6, expert_dim=30, max_loop_iters=4),
        data=dict(path=""),
        train=dict(global_batch=8, micro_batch=8 // replicas // 2, dtype=dtype, steps=STEPS),
        experts=dict(bias_update_rate=0.01),
        loops=dict(distribution="poisson", mean=3, maximum=5, backprop=2),
        optim=dict(grad_clip=0.2, eps=1e-6, warmup_steps=2, weight_decay=0.1),
        parallel=parallel,
        run=dict(seed=18),
    )


class Program:
    """Training with DeepSpeed alone."""

    def __init__(self, config: Config, stage: int, universal: bool = False):
        import deepspeed

        mythos_dist.model.init.STD = STD
        self.config, o = config, config.optim
        self.model = Mythos(config.model, act=config.act, experts=config.experts, seed=config.run.seed + universal)
        if not universal:
            self.model.recurrent.block.ffn.router.bias += torch.tensor(BIAS[: config.model.n_experts])
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for name, p in named if o.decays(name)], "weight_decay": o.weight_decay},
            {"params": [p for name, p in named if not o.decays(name)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(o, step + 1, config.train.steps) / o.lr
        )
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": config.train.micro_batch,
            "gradient_accumulation_steps": config.train.global_batch // RANKS // config.train.micro_batch,
            "gradient_clipping": o.grad_clip,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"load_universal": universal},
        }
        if config.train.dtype == "fp16":
            settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "hysteresis": 1}
        program: dict[str, Any] = {"model": self.model, "optimizer": optimizer, "lr_scheduler": schedule}
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(**program, config=settings)

    def train(self, steps: range) -> dict[str, list[float]]:
        """Losses and gradient norms of some steps."""
        import torch.distributed as dist

        losses, norms = [], []
        every = zip(range(1, steps.stop), batches(self.config, dist.get_rank(), RANKS), strict=False)
        for step, micro_batches in every:
            if step not in steps:
                continue
            drawn, loss = loops_at(self.config, step), torch.zeros(1)
            counts = torch.zeros(drawn.n_loops, self.config.model.n_experts, dtype=torch.int64)
            for batch in micro_batches:
                documents = batch.document_ids if self.config.data.document_mask else None
                loops = Loops(drawn.n_loops, drawn.no_grad_loops)
                out = self.engine(batch.input_ids, labels=batch.labels, document_ids=documents, loops=loops)
                self.engine.backward(out["objective"])
                self.engine.step()
                loss += out["cross_entropy"].detach() / len(micro_batches) / RANKS
                counts += out["expert_counts"]
            dist.all_reduce(loss)
            dist.all_reduce(counts)
            self.model.update_router_bias(counts)
            losses.append(float(loss))
            norms.append(float(self.engine.get_global_grad_norm()))
        return {"loss": losses, "grad_norm": norms}

    def state(self) -> dict[str, Any]:
        """Masters and moments by name; the router's bias. A collective call."""
        return gathered(self.model, self.engine.optimizer) | {"bias": [self.bias.clone()]}

    @property
    def bias(self) -> torch.Tensor:
        return self.model.recurrent.block.ffn.router.bias


def gathered(model: Mythos, optimizer: Any) -> dict[str, list[torch.Tensor]]:
    """Name -> master and moments, unsharded over replicas, gathered by DeepSpeed. A collective call."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links the moments after the first group's first step, when other groups have none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    weights: Callable[..., Any] = safe_get_full_fp32_param
    moment: Callable[..., Any] = safe_get_full_optimizer_state
    return {
        name: [weights(p).clone(), *(moment(p, kind).clone() for kind in ("exp_avg", "exp_avg_sq"))]
        for name, p in model.named_parameters()
    }


def our_engine(config: Config) -> Any:
    from mythos_dist.parallel.mesh import build_mesh
    from mythos_dist.train.engine import Engine

    mythos_dist.model.init.STD = STD
    return Engine(config, build_mesh(config.parallel))


def train_ours(engine: Any, config: Config, steps: range) -> dict[str, list[float]]:
    every = zip(range(1, steps.stop), batches(config, engine.mesh.data.rank, engine.mesh.data.size), strict=False)
    results = [engine.train_step(mine, step) for step, mine in every if step in steps]
    return {"loss": [step.loss for step in results], "grad_norm": [step.grad_norm for step in results]}


def convert(folder: Path, out: Path) -> None:
    """DeepSpeed's own conversion, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    workers = dict(num_extract_workers=1, num_merge_workers=1)
    options = dict(strict=True, keep_temp_folder=False, inject_missing_state=True)
    ds_to_universal.main(argparse.Namespace(input_folder=str(folder), output_folder=str(out), **workers, **options))


def train_and_save(cases: dict[str, tuple[Config, int]], ours: Config, folder: str) -> dict[str, Any]:
    """On each rank: programs of DeepSpeed's, then our run; each saves after SAVED steps and trains on."""
    import torch.distributed as dist

    results = {}
    for name, (config, stage) in cases.items():
        new_process_groups(name)
        print(name, file=sys.stderr)  # a launch that fails says where it was
        program = Program(config, stage)
        program.train(range(1, SAVED + 1))
        saved = Path(folder, name)
        program.engine.save_checkpoint(str(saved), tag="steps")
        state, scaler = program.state(), getattr(program.engine.optimizer, "loss_scaler", None)
        results[name] = {
            "state": state,
            "scale": {key: float(value) for key, value in vars(scaler).items() if isinstance(value, int | float)},
            "skipped": program.engine.skipped_steps,
        }
        dist.barrier()
        if dist.get_rank() == 0:
            convert(saved / "steps", saved / "universal")
        results[name] |= {"later": program.train(range(SAVED + 1, STEPS + 1)), "final": program.state()}
        program.engine.destroy()
        del program
    new_process_groups("ours")
    engine = our_engine(ours)
    engine.model.recurrent.block.ffn.router.bias += torch.tensor(BIAS[: ours.model.n_experts])
    train_ours(engine, ours, range(1, SAVED + 1))
    save_checkpoint(engine, ours, f"{folder}/ours", SAVED)
    later = train_ours(engine, ours, range(SAVED + 1, STEPS + 1))
    bias = engine.model.recurrent.block.ffn.router.bias.clone()
    final = gathered(engine.model, engine.ds_engine.optimizer) | {"bias": [bias]}
    results["ours"] = {"later": later, "final": final}
    engine.close()
    return results


def continue_both(exported: str, programs: dict[str, tuple[Config, int]], ours: dict[str, tuple[Config, str]]) -> Any:
    """On each rank: programs of DeepSpeed's continue from our export, and ours from imports."""
    results = {}
    for name, (config, stage) in programs.items():
        new_process_groups(f"program {name}")
        program = Program(config, stage, universal=True)
        _, client = program.engine.load_checkpoint(exported)
        program.model.load_state_dict(client["mythos_dist"]["buffers"], strict=False)
        if stage == 3:  # all groups share the tensor of their count of steps, which the step of each increments
            for state in program.engine.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()
        counts = [program.engine.global_steps, program.engine.skipped_steps, client["mythos_dist"]["step"]]
        results[f"program {name}"] = {"state": program.state(), "counts": counts}
        later = program.train(range(SAVED + 1, STEPS + 1))
        results[f"program {name}"] |= {"later": later, "final": program.state()}
        program.engine.destroy()
        del program
    for name, (config, folder) in ours.items():
        new_process_groups(f"ours {name}")
        engine = our_engine(change(config, run=dict(seed=99)))
        load_checkpoint(engine, folder)
        engine.config = config
        results[f"ours {name}"] = {"later": train_ours(engine, config, range(SAVED + 1, STEPS + 1))}
        bias = engine.model.recurrent.block.ffn.router.bias.clone()
        results[f"ours {name}"]["bias"] = bias
        if engine.mesh.tensor.size == engine.mesh.expert.size == 1:
            results[f"ours {name}"]["final"] = gathered(engine.model, engine.ds_engine.optimizer)
        engine.close()
        del engine
    return results


def tool(name: str, *arguments: object, code: int = 0) -> str:
    result = run_tool(REPOSITORY / "tools" / f"{name}.py", *arguments)
    assert result.codes == [code] and "Traceback" not in result.err, result.err
    return result.out + result.err


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("universal")
    cases = {name: (run_of(config, dtype, zero=1), stage) for name, (stage, dtype) in CASES.items()}
    results = run_ranks(RANKS, train_and_save, cases, run_of(config, zero=1), str(folder), seconds=900)
    return folder, results[0]


@pytest.fixture(scope="module")
def continued(trained, config) -> dict[str, Any]:
    """After the tools have exported and imported."""
    folder, _ = trained
    notes = tool("export_checkpoint", folder / "ours", "--out", folder / "out", "--format", "deepspeed-universal")
    imported = {}
    for name, (_, dtype) in CASES.items():
        run = folder / f"imported {name}"
        file = folder / f"{name}.yaml"
        settings = change(run_of(config, dtype, zero=1), run=dict(dir=str(run)), data=dict(path="not read"))
        file.write_text(dump_config(settings))
        notes += tool("import_deepspeed", folder / name / "universal", file)
        imported[name] = (run_of(config, dtype, **RESUMED_AT[name]), str(run))
    layouts: dict[str, dict[str, Any]] = LAYOUTS
    programs = {name: (run_of(config, **layout), layout["zero"]) for name, layout in layouts.items()}
    results = run_ranks(RANKS, continue_both, str(folder / "out"), programs, imported, seconds=900)
    return results[0] | {"notes": notes}


def equal(actual: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensors in expected.items():
        for one, other in zip(actual[name], tensors, strict=True):
            scale = float(other.abs().max()) + 1e-30
            torch.testing.assert_close(
                one / scale, other / scale, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_program_of_deepspeed_has_every_bit_of_our_checkpoint(name, trained, continued):
    """Masters, both moments and the bias, and the counts of steps."""
    found, source = continued[f"program {name}"], open_checkpoint(trained[0] / "ours")
    assert found["counts"] == [SAVED, 0, SAVED]
    for parameter, tensors in found["state"].items():
        if parameter == "bias":
            tensors, parameter, kinds = tensors, "recurrent.block.ffn.router.bias", ["buffer"]
        else:
            kinds = ["parameter", "exp_avg", "exp_avg_sq"]
        for kind, tensor in zip(kinds, tensors, strict=True):
            assert np.array_equal(tensor.numpy(), source.full_tensor(kind, parameter)), f"{kind} {parameter}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_program_of_deepspeed_continues_as_our_run_does(name, trained, continued):
    found, expected = continued[f"program {name}"], trained[1]["ours"]
    for key in ("loss", "grad_norm"):
        assert found["later"][key] == pytest.approx(expected["later"][key], rel=1e-6)
    equal(found["final"], expected["final"], 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_an_import_has_every_bit_of_deepspeeds_checkpoint(name, trained, continued):
    """Masters, both moments and the bias, the count of steps and fp16's loss scale."""
    folder, results = trained
    source, expected = open_checkpoint(folder / f"imported {name}"), results[name]
    for parameter, tensors in expected["state"].items():
        kinds = ["buffer"] if parameter == "bias" else ["parameter", "exp_avg", "exp_avg_sq"]
        parameter = "recurrent.block.ffn.router.bias" if parameter == "bias" else parameter
        for kind, tensor in zip(kinds, tensors, strict=True):
            assert np.array_equal(tensor.numpy(), source.full_tensor(kind, parameter)), f"{kind} {parameter}"
    manifest = source.manifest
    assert manifest.step == SAVED and manifest.optimizer["skipped_steps"] == expected["skipped"]
    assert manifest.optimizer["steps"] == SAVED - expected["skipped"]
    assert manifest.lineage.next_sample == 8 * SAVED
    if "fp16" in name:
        scale = manifest.optimizer["loss_scale"]
        assert scale and scale == {key: expected["scale"][key] for key in scale}


@pytest.mark.parametrize("name", CASES)
def test_our_run_continues_as_the_program_of_deepspeed_does(name, trained, continued):
    """At another layout. In fp16 the order of sums moves the last bits of every product."""
    found, expected = continued[f"ours {name}"], trained[1][name]
    tolerance = 2e-3 if "fp16" in name else 1e-6
    for key in ("loss", "grad_norm"):
        assert found["later"][key] == pytest.approx(expected["later"][key], rel=tolerance)
    assert torch.equal(found["bias"], expected["final"].pop("bias")[0]) or "fp16" in name
    if "final" in found and "fp16" not in name:
        equal(found["final"], expected["final"], 1e-5)


def test_the_tools_name_what_is_not_carried_over(continued):
    for note in ("set the router's bias", "weight decay 0.1 for matrices", "random numbers are your program's"):
        assert note in continued["notes"]
    assert "DeepSpeed's scheduler is not read" in continued["notes"]
