"""Networks, one idea a file; they take values and touch no files."""
