"""`cxr train localize` as a script.

ray job submit --working-dir . -- python jobs/train_localize.py --archive s3://xrays/nih --out s3://xrays/localize \\
    --preset published
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("train localize")
