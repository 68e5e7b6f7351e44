"""Tests of cxr/sources."""
