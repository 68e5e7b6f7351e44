"""`cxr train classify` as a script.

ray job submit --working-dir . -- python jobs/train_classify.py --archive s3://xrays/nih --out s3://xrays/classify \\
    --preset densenet121-chexnet
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("train classify")
