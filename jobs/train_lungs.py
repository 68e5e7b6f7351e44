"""`cxr train lungs` as a script.

ray job submit --working-dir . -- python jobs/train_lungs.py --out s3://xrays/train_lungs
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("train lungs")
