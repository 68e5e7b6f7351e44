"""`cxr export dicom` as a script.

ray job submit --working-dir . -- python jobs/export_dicom.py --run s3://xrays/scores --out s3://xrays/dicom
"""

from cxr.cli.main import run

if __name__ == "__main__":
    run("export dicom")
