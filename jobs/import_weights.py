"""`cxr import-weights` as a script.

python jobs/import_weights.py yolov5nu.pt --from ultralytics --trust --out yolov5nu
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("import-weights")
