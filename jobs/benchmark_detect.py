"""`cxr benchmark detect` as a script.

ray job submit --working-dir . -- python jobs/benchmark_detect.py --out s3://xrays/benchmark_detect
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark detect")
