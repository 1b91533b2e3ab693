"""Settings of a run whose steps take a few hundredths of a second."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "configs" / "tiny_cpu.yaml"
SMALL = (
    "model.dim=32 model.vocab_size=512 model.kv_lora_rank=16 model.q_lora_rank=16 model.max_loop_iters=2 "
    "train.seq_len=32 train.micro_batch=2 train.steps=6 train.eval_samples=4 optim.warmup_steps=2 optim.grad_clip=0.5 "
    "checkpoint.every=2 checkpoint.keep=3 "
    "run.peak_tflops=1 "  # else every start measures for 0.3 s
    "run.report=false"  # a report has 5 MB
).split()
