"""`cxr export kaggle-vinbigdata` as a script.

ray job submit --working-dir . -- python jobs/submit_vinbigdata.py --run s3://xrays/scores --out s3://xrays/csv
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("export kaggle-vinbigdata")
