"""Match the images that a list names to an archive's images: by file name, by path, or by image id.

A list of labels, boxes or masks may name an image by its path in the archive, by a path on another machine, by its
file name with or without a suffix, or by its SOPInstanceUID where files are named or identified by it.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema
from cxr.sources.image_files import IMAGE_SUFFIXES

_DEEPEST = 8  # folders of a path that are compared
_SUFFIX = rf"(?i)([^/\s])\s*\.(?:{'|'.join(sorted(IMAGE_SUFFIXES))})$"


@dataclass(frozen=True)
class Match:
    """Which row of a list describes which image."""

    rows: np.ndarray  # (N,) row of the list for each of the archive's images; -1 if there is none
    ambiguous: int  # images without a row that share their name with other images, or with several rows

    def ambiguity(self, file: str) -> str:
        """The end of a note about images that a file does not list: how many are ambiguous; empty if none is."""
        if not self.ambiguous:
            return ""
        return f"; with a file name that others share: {self.ambiguous:,} (use their paths in {file})"


def match_images(images: pa.Table, names: pa.ChunkedArray) -> Match:
    """Find the row that names each image.

    A row names an image if both have the same file name and no other row or image has it. Where several images or
    rows share a file name, one of the two paths must end with the other; folders that all images have in common do
    not count. Image suffixes are ignored.

    Args:
        images: a manifest; only its columns `schema.IMAGE_ID` and `schema.SOURCE_URI` are read.
        names: string, the `normalized` name in each row, each occurring once.
    """
    paths, ids = (normalized(images[column]) for column in (schema.SOURCE_URI, schema.IMAGE_ID))
    row_N, ambiguous_N = _by_ending(paths, names)
    if not pc.all(pc.equal(_ending(paths, 0), _ending(ids, 0)), min_count=0).as_py():  # ids that are not file names
        by_id_N, shared_N = _by_ending(ids, names)
        by_id_N[np.isin(by_id_N, row_N)] = -1
        row_N = np.where(row_N < 0, by_id_N, row_N)
        ambiguous_N |= shared_N
    return Match(row_N, int((ambiguous_N & (row_N < 0)).sum()))


def image_paths(names: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The `normalized` names of a list, as one array of strings."""
    joined = names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names
    return normalized(pa.chunked_array([joined])).combine_chunks().cast(pa.string())


def normalized(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Image names without surrounding blanks, "./" and image suffixes, with forward slashes."""
    names = pc.utf8_trim_whitespace(pc.replace_substring(names.cast(pa.large_string()), "\\", "/"))
    names = pc.replace_substring_regex(names, r"^(\./)+", "")
    names = pc.replace_substring_regex(names, r"(?i)(\.dcm|\.dicom)\.gz$", r"\1")
    for _ in range(2):  # a copy may keep the original's suffix: A.dicom.png
        names = pc.replace_substring_regex(names, _SUFFIX, r"\1")
    return names


def _by_ending(paths: pa.ChunkedArray, names: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the row that names each path, -1 if none; (N,) bool, whether the path's file name is not unique."""
    row_N, shared_N = _unique_pairs(_ending(paths, 0), _ending(names, 0))
    path_folders_N, name_folders_M = _folders(_below_root(paths)), _folders(names)
    for folders in range(1, 1 + min(_DEEPEST, int(name_folders_M.max(initial=0)))):
        if not (shared_N & (row_N < 0)).any():
            break
        longer_N, _ = _unique_pairs(_ending(paths, folders), _ending(names, folders))
        whole_N = (path_folders_N <= folders) | (name_folders_M[longer_N] == folders)  # p1/s1 is not p2/s1
        row_N = np.where((row_N < 0) & whole_N, longer_N, row_N)
    return row_N, shared_N


def _below_root(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """The paths without the folders that they all have in common."""
    ends = pc.min_max(paths)
    common = posixpath.commonprefix([ends["min"].as_py(), ends["max"].as_py()]).rpartition("/")[0]
    return pc.utf8_slice_codeunits(paths, len(common) + 1) if common else paths


def _folders(paths: pa.ChunkedArray) -> np.ndarray:
    return pc.count_substring(paths, "/").to_numpy()


def _ending(paths: pa.ChunkedArray, folders: int) -> pa.ChunkedArray:
    """The file name and its last folders; null for paths with fewer."""
    ending = pc.replace_substring_regex(paths, rf"^.*/((?:[^/]*/){{{folders}}}[^/]*)$", r"\1")
    if not folders:
        return ending
    return pc.if_else(pc.equal(pc.count_substring(ending, "/"), folders), ending, None)


def _unique_pairs(images: pa.ChunkedArray, rows: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the row with the same key as each image, -1 if there is none or if the key is not unique on both sides;
    (N,) bool, whether the key is on both sides, but not unique."""
    both = pa.chunked_array([*images.chunks, *rows.chunks], pa.large_string())
    code = both.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    image_N, row_M = code[: len(images)], code[len(images) :]
    codes = code.max(initial=-1) + 1
    images_C, rows_C = (np.bincount(part[part >= 0], minlength=codes) for part in (image_N, row_M))
    row_C = np.full(codes + 1, -1)  # the last is that of null
    row_C[row_M] = np.arange(len(row_M))
    row_C[codes] = -1
    unique_C = np.append((images_C == 1) & (rows_C == 1), False)
    shared_C = np.append((images_C > 0) & (rows_C > 0), False) & ~unique_C
    return np.where(unique_C[image_N], row_C[image_N], -1), shared_C[image_N]
