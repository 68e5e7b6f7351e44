"""`cxr benchmark step` as a script.

ray job submit --working-dir . -- python jobs/benchmark_step.py --out s3://xrays/benchmark_step
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark step")
