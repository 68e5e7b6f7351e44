"""`cxr score` as a script.

ray job submit --working-dir . -- python jobs/score_archive.py --archive s3://xrays/nih --checkpoint s3://xrays/align
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("score")
