"""`cxr train pneumothorax` as a script.

ray job submit --working-dir . -- python jobs/train_pneumothorax.py --out s3://xrays/train_pneumothorax
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("train pneumothorax")
