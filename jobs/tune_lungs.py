"""`cxr tune lungs` as a script.

ray job submit --working-dir . -- python jobs/tune_lungs.py --archive s3://xrays/montgomery \\
    --out s3://xrays/tune --trials 20
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("tune lungs")
