"""`cxr benchmark fusion` as a script.

ray job submit --working-dir . -- python jobs/benchmark_fusion.py --out s3://xrays/benchmark_fusion
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark fusion")
