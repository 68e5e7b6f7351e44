"""`cxr study pneumothorax` as a script.

ray job submit --working-dir . -- python jobs/study_pneumothorax.py --archive s3://xrays/siim \\
    --out s3://xrays/study --preset published
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("study pneumothorax")
