"""`cxr export onnx` as a script.

ray job submit --working-dir . -- python jobs/export_onnx.py --out s3://xrays/export_onnx
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("export onnx")
