"""Training: the engine in plain torch, and `fit`, which runs it on Ray Train and lays out a run."""
