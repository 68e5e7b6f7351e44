"""Evaluation of scoring runs: `reports` writes the report of any family's run."""
