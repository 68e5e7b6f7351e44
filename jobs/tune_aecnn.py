"""`cxr tune aecnn` as a script.

ray job submit --working-dir . -- python jobs/tune_aecnn.py --archive s3://xrays/nih \\
    --out s3://xrays/tune --trials 40 --objectives mean_auroc psnr_pooled
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("tune aecnn")
