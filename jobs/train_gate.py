"""`cxr train gate` as a script.

ray job submit --working-dir . -- python jobs/train_gate.py --archive /data/chestxray14 --out /data/gate
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("train gate")
