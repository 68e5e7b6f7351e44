"""`cxr report` as a script.

ray job submit --working-dir . -- python jobs/report_run.py --run s3://xrays/scores --out s3://xrays/report
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("report")
