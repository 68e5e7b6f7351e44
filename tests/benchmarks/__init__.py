"""Tests of cxr.benchmarks."""
