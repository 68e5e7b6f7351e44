"""Recognize DICOM files by their first bytes (PS3.10), without importing pydicom, which takes half a second."""

from __future__ import annotations

import struct

PREAMBLE_BYTES, MAGIC = 128, b"DICM"
LONG_VR = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
"""Value representations whose length takes 4 bytes (PS3.5 7.1.2)."""
_FIRST_GROUPS = range(0x0002, 0x0033)
_SHORT_VR = set(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_UNDEFINED_LENGTH = 0xFFFFFFFF  # of a sequence
_ITEMS = (b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0")  # first tag in a sequence: an item or the sequence delimiter


def has_preamble(data: bytes) -> bool:
    """Whether the bytes are a DICOM file (PS3.10); the preamble's content does not matter."""
    return data.startswith(MAGIC, PREAMBLE_BYTES)


def begins_like_data_set(data: bytes) -> bool:
    """Whether the bytes may be a data set without preamble, as in old archives, which begins with any low tag."""
    if len(data) < 8:
        return False
    for order in "<>":
        group, element = struct.unpack_from(order + "HH", data)
        if group in _FIRST_GROUPS and data[4:6] in LONG_VR | _SHORT_VR:
            return True
    group, element, length = struct.unpack_from("<HHI", data)  # implicit VR is little-endian
    if group not in _FIRST_GROUPS:
        return False
    if length == _UNDEFINED_LENGTH:
        return data.startswith(_ITEMS, 8)
    next_tag = data[8 + length : 12 + length]
    return len(next_tag) == 4 and (group, element) < struct.unpack("<HH", next_tag) <= (0x7FE0, 0x0010)
