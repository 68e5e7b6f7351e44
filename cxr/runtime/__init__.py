"""How a job runs: the Ray cluster, signals, exit codes, progress, the lease on its folder."""
