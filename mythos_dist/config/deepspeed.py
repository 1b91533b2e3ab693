"""The only place that writes DeepSpeed's JSON.

Decisions: PARALLEL-20.
"""

from typing import Any

from mythos_dist.config.schema import Config

LARGEST_BUCKET = 500_000_000  # elements: DeepSpeed's default for reduce_bucket_size


def reduce_bucket_size(elements: int) -> int:
    """Elements of the buffer in which ZeRO reduces the gradients of a rank that holds `elements` of parameters."""
    return min(LARGEST_BUCKET, elements)


def deepspeed_config(config: Config, num_replicas: int, elements: int) -> dict[str, Any]:
    """DeepSpeed's settings for a run on `num_replicas` replicas, of a rank that holds `elements` of parameters."""
    train = config.train
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.global_batch // (train.micro_batch * num_replicas),
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": {"stage": config.parallel.zero, "reduce_bucket_size": reduce_bucket_size(elements)},
        "zero_allow_untested_optimizer": True,  # ours: train/optimizer.py: SkippableOptimizer
        # Otherwise tensor ranks would split the tensors sent between stages, and expect a tuple of tensors.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 1 << 60,  # we log every step ourselves
    }
    if train.dtype == "bf16":
        # Add each gradient to its accumulator as soon as it is complete, and free it: by default all of them stay
        # allocated for the whole run, 2 bytes per parameter.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        if config.parallel.zero == 1:  # stages 2 and 3 can accumulate in bf16 only
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    elif train.dtype == "fp16":
        # Dynamic loss scale, initially 2^16; a step that overflows is skipped and halves it.
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "hysteresis": 1}
    return settings
