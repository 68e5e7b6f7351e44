"""Tests of cxr.boxes."""
