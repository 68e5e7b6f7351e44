"""cxr: chest X-ray models trained, tuned and scored on a Ray cluster."""

__version__ = "0.1.0"
