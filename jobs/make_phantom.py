"""`cxr phantom` as a script.

ray job submit --working-dir . -- python jobs/make_phantom.py --out s3://xrays/phantom
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("phantom")
