"""Tests of cxr.augment."""
