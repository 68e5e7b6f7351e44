"""Tests of cxr.train."""
