"""Files of boxes that a user gives beside an archive (`--boxes`): COCO JSON, VinBigData's or the RSNA's columns.

Their content, not their name, tells which of these they are:

    COCO JSON    see `coco`
    VinBigData   image_id, class_name and/or class_id, x_min, y_min, x_max, y_max; see `annotations`
    RSNA         patientId, x, y, width, height, Target, as in the RSNA Pneumonia Detection Challenge; see
                 `rsna_pneumonia`
"""

from __future__ import annotations

from cxr.errors import UserError
from cxr.sources import coco, rater_agreement, rsna_pneumonia
from cxr.sources.annotations import CLASS_NAME, IMAGE, Read, read
from cxr.sources.csv_table import has_columns, read_csv
from cxr.sources.image_match import image_paths

RSNA_COLUMNS = (rsna_pneumonia.IMAGE, *rsna_pneumonia.BOX, rsna_pneumonia.TARGET)


def read_boxes(location: str) -> Read:
    """Read a file of boxes in one of the formats above. Images are identified by their `image_paths`.

    Raises:
        UserError: it is none of them, or damaged; the message names the line or the entry.
        StorageError: the file cannot be read.
    """
    if coco.is_json(location):
        content = coco.read_coco(location)
        boxes = coco.boxes(content)
        sizes = {image: size for image, size in content.sizes_px.items() if size}
        return Read.of(content.labels, boxes, sizes, content.notes)
    if has_columns(location, RSNA_COLUMNS):
        return _read_rsna(location)
    if has_columns(location, (IMAGE, *rater_agreement.CORNERS)):
        return read(location, "own", image_paths)
    raise UserError(
        f"{location}: expected boxes as COCO JSON or as CSV with the columns {IMAGE}, "
        f"{CLASS_NAME}, {', '.join(rater_agreement.CORNERS)} or {', '.join(RSNA_COLUMNS)}, got "
        f"neither: convert the file to one of these"
    )


def _read_rsna(location: str) -> Read:
    _, boxes, notes = rsna_pneumonia.read_labels(read_csv(location, RSNA_COLUMNS), image_paths)
    frame = [rsna_pneumonia.FRAME_PX] * 2
    return Read.of((rsna_pneumonia.FINDING,), boxes, dict.fromkeys(boxes, frame), notes)
