"""What a KVCache holds."""

from mythos_dist.model.kv_cache import KVCache


def elements_per_token(cache: KVCache) -> dict[str, int]:
    """The elements that each layer and loop caches per token."""
    return {key: buffer[0, 0].numel() for key, buffer in cache._buffers.items()}
