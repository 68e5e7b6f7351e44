"""Tests of cxr.judge."""
