"""mythos_dist: train the OpenMythos Recurrent-Depth Transformer, from a laptop to a cluster.

`__all__` is what other programs may import; everything else may change without notice. Names are imported at their
first use: `import mythos_dist` imports neither torch nor a package of this one.

Decisions: PROJECT-8.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # as in _MODULE_OF
    from mythos_dist.checkpoint.restore import load_model
    from mythos_dist.config.load import load_config, load_stages
    from mythos_dist.config.schema import ActConfig, Config, ExpertsConfig, MythosConfig
    from mythos_dist.data.tokenizer import Tokenizer
    from mythos_dist.errors import UserError
    from mythos_dist.generate.engine import DecodingEngine
    from mythos_dist.generate.sampling import Sampling
    from mythos_dist.generate.trained import load_trained
    from mythos_dist.model.kv_cache import KVCache
    from mythos_dist.model.mythos import Mythos
    from mythos_dist.ops.plan.clusters import load_cluster
    from mythos_dist.ops.plan.estimate import Estimate
    from mythos_dist.prepare.convert import convert
    from mythos_dist.prepare.tokenizer_training import train_tokenizer
    from mythos_dist.prepare.verify import verify
    from mythos_dist.train.sweep import sweep

__version__ = "0.1.0"

__all__ = [
    "ActConfig",
    "Config",
    "DecodingEngine",
    "Estimate",
    "ExpertsConfig",
    "KVCache",
    "Mythos",
    "MythosConfig",
    "Sampling",
    "Tokenizer",
    "UserError",
    "convert",
    "load_cluster",
    "load_config",
    "load_model",
    "load_stages",
    "load_trained",
    "sweep",
    "train_tokenizer",
    "verify",
]

_MODULE_OF = {
    "ActConfig": "config.schema",
    "Config": "config.schema",
    "DecodingEngine": "generate.engine",
    "Estimate": "ops.plan.estimate",
    "ExpertsConfig": "config.schema",
    "KVCache": "model.kv_cache",
    "Mythos": "model.mythos",
    "MythosConfig": "config.schema",
    "Sampling": "generate.sampling",
    "Tokenizer": "data.tokenizer",
    "UserError": "errors",
    "convert": "prepare.convert",
    "load_cluster": "ops.plan.clusters",
    "load_config": "config.load",
    "load_model": "checkpoint.restore",
    "load_stages": "config.load",
    "load_trained": "generate.trained",
    "sweep": "train.sweep",
    "train_tokenizer": "prepare.tokenizer_training",
    "verify": "prepare.verify",
}


def __getattr__(name: str) -> Any:
    """A public name, at its first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
