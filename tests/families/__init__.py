"""Tests of cxr.families."""
