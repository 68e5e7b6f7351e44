"""`cxr tune align` as a script.

ray job submit --working-dir . -- python jobs/tune_align.py --archive s3://xrays/nih --out s3://xrays/tune --trials 20
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("tune align")
