"""Token files of other trainers: Megatron, nanotron's nanoset, saved Hugging Face data sets, MosaicML's MDS.

listing.py       sources -> formats; files.py: what all formats share: open, check, hash
rows.py          rows of token ids, and blocks of them; flat.py: of one array on disk
megatron.py, nanoset.py, saved_dataset.py, mds_folder.py: the formats
documents.py     rows of a span -> documents without EOS; preview.py: how a source begins, for the console
"""
