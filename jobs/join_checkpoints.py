"""`cxr ensemble` as a script.

ray job submit --working-dir . -- python jobs/join_checkpoints.py --checkpoint s3://xrays/a/checkpoint \\
    --checkpoint s3://xrays/b/checkpoint --archive s3://xrays/shards --out s3://xrays/ensemble
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("ensemble")
