"""The model's classes for Hugging Face's transformers, as files that `checkpoint/export.py` copies into an export.

They import PyTorch and transformers only, and nothing of this package imports them.

Decisions: HF-1.
"""
