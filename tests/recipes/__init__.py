"""Tests of cxr.recipes."""
