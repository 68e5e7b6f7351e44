"""`cxr train detect` as a script.

ray job submit --working-dir . -- python jobs/train_detect.py --out s3://xrays/train_detect
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("train detect")
