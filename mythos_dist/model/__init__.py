"""The model: `Mythos(MythosConfig(...))` is a plain `nn.Module`."""

from mythos_dist.config.schema import ExpertsConfig, MythosConfig
from mythos_dist.model.attention import KVCache
from mythos_dist.model.mythos import Mythos

__all__ = ["ExpertsConfig", "KVCache", "Mythos", "MythosConfig"]
