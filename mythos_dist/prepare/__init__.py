"""Text to shards: parquet, JSON lines or plain text -> tokens -> windows -> MDS shards, verified."""
