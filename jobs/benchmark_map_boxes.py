"""`cxr benchmark map-boxes` as a script.

ray job submit --working-dir . -- python jobs/benchmark_map_boxes.py --out s3://xrays/benchmark_map_boxes
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark map-boxes")
