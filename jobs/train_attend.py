"""`cxr train attend` as a script.

ray job submit --working-dir . -- python jobs/train_attend.py --out s3://xrays/train_attend
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("train attend")
