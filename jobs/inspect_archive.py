"""`cxr inspect` as a script.

ray job submit --working-dir . -- python jobs/inspect_archive.py --out s3://xrays/inspection
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("inspect")
