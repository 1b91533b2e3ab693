"""Ranks: which process this is, and what it shares with the others."""
