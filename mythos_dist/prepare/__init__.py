"""Prepare training data: text (parquet, JSON lines, plain text) to MDS shards, and their verification.

convert.py         the conversion; part.py: its unit of work; part_converter.py: documents -> shards of a part
finish.py          partial windows, indexes, manifest; heldout.py: the held-out split; duplicates.py; resume.py
listing.py         inputs -> files; local_files.py, remote_files.py, file_list.py, patterns.py, names.py
inputs.py          one input file; spans.py: its chunks; documents.py, batches.py: documents of a span;
                   parquet.py, lines.py, encoding.py: formats
conversations.py   conversations as documents; chat_converter.py: a part of them; packing.py: into windows
tokens/            token files of other trainers; token_converter.py: a part of them
mds.py             the shard format; pool.py, conversion_bar.py: worker processes and progress
verify.py          check a folder of shards; verify_shard.py: one shard
corpus.py          texts as strings, and a small sample corpus
"""
