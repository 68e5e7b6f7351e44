"""Input and training throughput, compared with plain loops on the same machine and files in the same run."""
