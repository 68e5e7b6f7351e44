"""`cxr benchmark align` as a script.

ray job submit --working-dir . -- python jobs/benchmark_align.py --out s3://xrays/benchmark_align
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark align")
