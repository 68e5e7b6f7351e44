"""`cxr study preprocessing` as a script.

ray job submit --working-dir . -- python jobs/study_preprocessing.py --archive s3://xrays/nih \\
    --lungs s3://xrays/lungs/checkpoint --out s3://xrays/study
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("study preprocessing")
