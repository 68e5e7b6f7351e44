"""Tests of cxr.inference."""
