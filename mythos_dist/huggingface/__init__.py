"""The model's classes for Hugging Face's transformers, files that `checkpoint/hugging_face.py` copies into an export.

They import PyTorch and transformers only, and nothing of this package imports them.

Decisions: HF-1.
"""
