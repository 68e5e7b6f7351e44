"""Tests of cxr.runtime."""
