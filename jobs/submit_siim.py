"""`cxr export kaggle-siim` as a script.

ray job submit --working-dir . -- python jobs/submit_siim.py --run s3://xrays/scores --out s3://xrays/submission_siim
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("export kaggle-siim")
