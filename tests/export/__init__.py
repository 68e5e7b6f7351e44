"""Tests of cxr.export."""
