"""`cxr study alignment` as a script.

ray job submit --working-dir . -- python jobs/study_alignment.py --archive s3://xrays/nih --out s3://xrays/study \\
    --aligner s3://xrays/align/checkpoint --preset published
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("study alignment")
