"""`cxr study lungs` as a script.

ray job submit --working-dir . -- python jobs/study_lungs.py --archive s3://xrays/montgomery \\
    --archive s3://xrays/shenzhen --out s3://xrays/study --seeds 3
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("study lungs")
