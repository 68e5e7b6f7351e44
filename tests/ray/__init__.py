"""End to end on one local Ray cluster."""
