"""Metrics of trained networks, one subject per package; tensors in, numbers out."""
