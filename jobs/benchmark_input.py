"""`cxr benchmark input` as a script.

ray job submit --working-dir . -- python jobs/benchmark_input.py --out s3://xrays/benchmark_input
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark input")
