"""Tests of cxr.metrics."""
