"""`cxr benchmark score` as a script.

ray job submit --working-dir . -- python jobs/benchmark_score.py --out s3://xrays/benchmark_score
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark score")
