"""`cxr train phantom-lungs` as a script.

ray job submit --working-dir . -- python jobs/train_phantom_lungs.py --out s3://xrays/train_phantom_lungs
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("train phantom-lungs")
