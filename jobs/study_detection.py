"""`cxr study detection` as a script.

ray job submit --working-dir . -- python jobs/study_detection.py --preset published --archive s3://xrays/vindr-cxr \\
    --lungs s3://xrays/lungs/checkpoint --out s3://xrays/study
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("study detection")
