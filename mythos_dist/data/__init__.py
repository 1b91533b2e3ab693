"""Shards to batches: tokenizers, the folders of shards that a run reads, the micro-batches of one replica."""
