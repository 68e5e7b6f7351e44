"""`cxr train align` as a script.

ray job submit --working-dir . -- python jobs/train_align.py --archive s3://xrays/nih --out s3://xrays/a --workers 8
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("train align")
