"""Comparisons with other methods and other loops, on the same files in the same run."""
