"""Rules of `model.rope_scaling`: its factor and the lengths, and which fields belong to which kind.

Decisions: MODEL-20.
"""

from collections.abc import Iterator

from mythos_dist.config.layout import Problem
from mythos_dist.config.schema import (
    BETA_FAST,
    BETA_SLOW,
    HIGH_FREQ_FACTOR,
    LOW_FREQ_FACTOR,
    MythosConfig,
    RopeScaling,
)

_FIELDS = {  # by the kind that has them
    "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}


def rope_problems(model: MythosConfig, scaling: RopeScaling) -> Iterator[Problem]:
    """What is wrong with the scaling of a model's rotary positions."""
    original, longest = scaling.original_max_seq_len, model.max_seq_len
    stretched = scaling.factor * original
    settings = ("model.rope_scaling", "model.max_seq_len")
    if longest < original:
        yield Problem(
            settings,
            f"model.max_seq_len={longest} is shorter than model.rope_scaling.original_max_seq_len={original}; set it "
            f"to {round(stretched)}, or model.rope_scaling=null",
        )
    elif scaling.kind != "llama3" and abs(stretched - longest) >= 1:
        yield Problem(
            settings,
            f"model.rope_scaling.factor={scaling.factor:g} times original_max_seq_len={original} is {stretched:g} "
            f"tokens, but model.max_seq_len={longest}; set factor to {longest / original:.10g}, or model.max_seq_len "
            f"to {round(stretched)}",
        )
    for kind, fields in _FIELDS.items():
        unused = [name for name in fields if getattr(scaling, name) is not None]
        if scaling.kind != kind and unused:
            yield Problem(
                settings[:1],
                f"model.rope_scaling: {', '.join(unused)} {'is' if len(unused) == 1 else 'are'} of kind={kind}, and "
                f"kind is {scaling.kind}; leave {'it' if len(unused) == 1 else 'them'} out",
            )
    low, high = scaling.low_freq_factor or LOW_FREQ_FACTOR, scaling.high_freq_factor or HIGH_FREQ_FACTOR
    if low >= high:
        yield Problem(
            settings[:1],
            f"model.rope_scaling.low_freq_factor={low:g} is not below high_freq_factor={high:g}; raise the latter",
        )
    fast, slow = scaling.beta_fast or BETA_FAST, scaling.beta_slow or BETA_SLOW
    if fast < slow:
        yield Problem(
            settings[:1],
            f"model.rope_scaling.beta_fast={fast:g} is less than beta_slow={slow:g}; set it to at least {slow:g}",
        )
    if scaling.mscale is not None and scaling.mscale_all_dim is None:
        yield Problem(
            settings[:1],
            f"model.rope_scaling.mscale={scaling.mscale:g} has no effect without mscale_all_dim; set both "
            "(DeepSeek-V3: 1), or none",
        )
    if scaling.kind != "linear" and model.rope_theta <= 1:
        yield Problem(
            (*settings[:1], "model.rope_theta"),
            f"model.rope_theta={model.rope_theta:g} does not work with model.rope_scaling.kind={scaling.kind}, which "
            "needs frequencies that fall; set it above 1",
        )
