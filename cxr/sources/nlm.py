"""The two tuberculosis data sets with lung masks of the National Library of Medicine: Montgomery and Shenzhen.

    montgomery: CXR_png/MCUCXR_0001_0.png  ManualMask/leftMask/MCUCXR_0001_0.png  ManualMask/rightMask/…
    shenzhen:   CXR_png/CHNCXR_0001_0.png  mask/CHNCXR_0001_0_mask.png

Images and Montgomery's masks: Jaeger et al. 2014 (Quant. Imaging Med. Surg. 4(6), 475–477). Shenzhen's masks, which
do not cover every image: Stirenko et al. 2018. Images and masks in another format are accepted as well (see
`image_files.image_key`). There is one image per patient. The last digit of a name is 1 for tuberculosis and 0
otherwise; since `schema.FINDINGS` has no tuberculosis, it goes into `extra`. The texts in `ClinicalReadings/` of the
full releases are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from cxr import schema
from cxr.sources.image_files import PATH, files_below, image_key, list_images
from cxr.sources.manifest import Manifest, labels_column, manifest_table
from cxr.sources.splits import split_by_patient
from cxr.storage import UnreadableError, join
from cxr.wording import counted

IMAGES = "CXR_png"
TUBERCULOSIS = "tuberculosis"  # in `extra`: 0 or 1
LISTED_TO_DETECT = 20  # files of CXR_png to examine


@dataclass(frozen=True)
class MaskedLungs:
    """The source of one of the two data sets.

    Args:
        name: name of the source.
        prefix: prefix of the image names.
        masks: paths of the masks that together cover an image's lungs; "{}" stands for its name without ".png".
    """

    name: str
    prefix: str
    masks: tuple[str, ...]

    def detect(self, uri: str) -> bool:
        """Whether CXR_png contains such names; lists a few files, because no particular file is always present."""
        try:
            names = [entry.path for entry in islice(files_below(join(uri, IMAGES)), LISTED_TO_DETECT)]
        except UnreadableError:  # for example, if CXR_png is below a file
            return False
        return any(image_key(name).startswith(self.prefix) for name in names)

    def manifest(self, uri: str) -> Manifest:
        """List every image in CXR_png; masks are null where missing, which a note counts.

        Raises:
            UserError: there are no images.
        """
        files, notes = list_images(join(uri, IMAGES))
        names = files[PATH]
        keys = [image_key(name) for name in names.to_pylist()]
        masks = self._masks(uri, keys)
        patients = pa.array([f"{key}.png" for key in keys], pa.string())  # the published name, also for copies
        columns = {
            schema.IMAGE_ID: names,
            schema.PATIENT_ID: patients,
            schema.SPLIT: split_by_patient(patients),
            schema.SOURCE_URI: files[schema.SOURCE_URI],
            schema.LABELS: labels_column(np.empty((len(names), 0), np.int8)),
            schema.MASKS: masks,
            schema.EXTRA: pa.array([_extra(key) for key in keys], pa.string()),
        }
        if masks.null_count:
            notes.append(f"without lung masks: {masks.null_count:,} of {counted(len(names), 'image')}")
        return Manifest(manifest_table(columns), (), notes)

    def _masks(self, uri: str, keys: Sequence[str]) -> pa.Array:
        """Column `masks`; null unless all mask files of the image exist, because one lung would be a wrong mask."""
        folders = [mask.rpartition("/")[0] for mask in self.masks]
        existing = [{image_key(entry.path): entry.uri for entry in files_below(join(uri, each))} for each in folders]
        masks = []
        for key in keys:
            uris = [of.get(image_key(mask.format(key))) for of, mask in zip(existing, self.masks, strict=True)]
            masks.append([_mask(uri) for uri in uris if uri] if all(uris) else None)
        return pa.array(masks, schema.MANIFEST.field(schema.MASKS).type)


def _mask(uri: str) -> dict[str, str | None]:
    return {schema.LABEL: schema.LUNGS, schema.MASK_RLE: None, schema.MASK_URI: uri}


def _extra(key: str) -> str | None:
    ending = re.search(r"_([01])$", key)
    return json.dumps({TUBERCULOSIS: int(ending[1])}) if ending else None


montgomery = MaskedLungs("montgomery", "MCUCXR_", ("ManualMask/leftMask/{}.png", "ManualMask/rightMask/{}.png"))
shenzhen = MaskedLungs("shenzhen", "CHNCXR_", ("mask/{}_mask.png",))
