"""`cxr study localization` as a script.

ray job submit --working-dir . -- python jobs/study_localization.py --archive s3://xrays/nih --out s3://xrays/study \\
    --backbone densenet121 --size 512 --stored-size 512 --pooling mean --backbone-pretrained s3://models/densenet121.pth
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("study localization")
