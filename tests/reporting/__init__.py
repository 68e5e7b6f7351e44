"""Tests of cxr.reporting."""
