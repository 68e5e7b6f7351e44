"""`cxr benchmark compression` as a script.

ray job submit --working-dir . -- python jobs/benchmark_compression.py --out s3://xrays/benchmark_compression
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark compression")
