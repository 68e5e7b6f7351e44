"""`cxr evaluate` as a script.

ray job submit --working-dir . -- python jobs/evaluate_run.py --run s3://xrays/scores --out s3://xrays/evaluation
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("evaluate")
