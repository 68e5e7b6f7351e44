"""Tests of cxr.cli."""
