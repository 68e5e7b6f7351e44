"""`cxr study features` as a script.

ray job submit --working-dir . -- python jobs/study_features.py --archive s3://xrays/nih --out s3://xrays/study \\
    --backbones resnet50 densenet121 --backbone-pretrained IMAGENET1K_V1 --size 224 --stored-size 256
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("study features")
