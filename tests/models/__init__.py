"""Tests of cxr.models."""
