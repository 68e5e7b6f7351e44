"""Tests, laid out as cxr/ is."""
