"""Tests of cxr.storage."""
