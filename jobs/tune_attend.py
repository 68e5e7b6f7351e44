"""`cxr tune attend` as a script.

ray job submit --working-dir . -- python jobs/tune_attend.py --archive s3://xrays/nih \\
    --out s3://xrays/tune --trials 20
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("tune attend")
