"""`cxr benchmark families` as a script.

python jobs/benchmark_families.py --out runs/benchmark_families
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("benchmark families")
