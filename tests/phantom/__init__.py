"""Tests of cxr.phantom."""
