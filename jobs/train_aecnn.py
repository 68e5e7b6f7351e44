"""`cxr train aecnn` as a script.

ray job submit --working-dir . -- python jobs/train_aecnn.py --archive s3://xrays/nih --out s3://xrays/a --workers 8
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("train aecnn")
