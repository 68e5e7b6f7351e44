"""Tests of cxr.report."""
