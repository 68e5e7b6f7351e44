"""`cxr thresholds` as a script.

ray job submit --working-dir . -- python jobs/choose_thresholds.py --run s3://xrays/scores --out s3://xrays/thresholds
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("thresholds")
