"""`cxr export coco` as a script.

ray job submit --working-dir . -- python jobs/export_coco.py --run s3://xrays/scores --out s3://xrays/export
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("export coco")
