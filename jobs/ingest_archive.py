"""`cxr ingest` as a script.

ray job submit --working-dir . -- python jobs/ingest_archive.py --archive s3://xrays/nih --out s3://xrays/shards
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("ingest")
