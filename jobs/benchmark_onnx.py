"""`cxr benchmark onnx` as a script.

ray job submit --working-dir . -- python jobs/benchmark_onnx.py --out s3://xrays/benchmark_onnx
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark onnx")
