"""Scores of whole archives by checkpoints."""
