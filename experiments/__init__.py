"""Comparisons made of many trainings: what docs/loops.md says is measured here."""
