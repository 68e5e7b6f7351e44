"""`cxr benchmark heads` as a script.

ray job submit --working-dir . -- python jobs/benchmark_heads.py --out s3://xrays/benchmark_heads
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark heads")
