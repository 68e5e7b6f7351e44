"""`cxr study localization` as a script.

ray job submit --working-dir . -- python jobs/study_localization.py --archive s3://xrays/nih --out s3://xrays/study \\
    --preset published --backbone-pretrained s3://models/densenet121.pth
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("study localization")
