"""Comparisons of networks with other methods for the same task, on the same images in the same run."""
