"""The model: `Mythos(MythosConfig(...))` is a plain `nn.Module`."""

from mythos_dist.config.schema import ActConfig, ExpertsConfig, MythosConfig
from mythos_dist.model.kv_cache import KVCache
from mythos_dist.model.mythos import Mythos

__all__ = ["ActConfig", "ExpertsConfig", "KVCache", "Mythos", "MythosConfig"]
