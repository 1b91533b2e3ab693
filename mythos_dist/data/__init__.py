"""Text to batches: parquet -> tokens -> windows -> MDS shards -> the micro-batches of one replica."""
