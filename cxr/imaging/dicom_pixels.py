"""Decode DICOM pixel data to samples, and convert samples to stored values (PS3.5 section 8)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydicom import Dataset, uid
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import convert_color_space

from cxr.errors import ImageRejectedError
from cxr.imaging.dicom_codestream import Codestream, decode_codestream, decode_reduced, decode_rle, read_header
from cxr.imaging.dicom_tags import code, number, value
from cxr.imaging.image import check_decoding_bytes, check_size

_LOSSY = {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K}
_RLE_RATIO = 64  # two bytes encode a run of up to 128 bytes


@dataclass(frozen=True)
class SampleBits:
    """Position of the stored value in a sample: `stored` bits, the highest of which is bit `high` (PS3.5 8.1.1)."""

    allocated: int  # 8 or 16; fewer if the codestream has fewer
    stored: int
    high: int
    signed: bool
    clipped: bool = False  # lossy codecs may exceed the range of the stored bits

    @property
    def smallest(self) -> int:
        return -(1 << (self.stored - 1)) if self.signed else 0

    @property
    def largest(self) -> int:
        return self.smallest + (1 << self.stored) - 1

    def values(self, samples: np.ndarray) -> np.ndarray:
        """Samples as unsigned numbers -> stored values, int32."""
        low = self.high + 1 - self.stored
        if self.clipped:
            whole = _as_signed(samples, self.allocated) if self.signed else samples.astype(np.int32)
            return np.clip(whole >> low, self.smallest, self.largest)
        bits = (samples.astype(np.int32) >> low) & ((1 << self.stored) - 1)
        return _as_signed(bits, self.stored) if self.signed else bits

    def value(self, encoded: int) -> int:
        """The stored value meant by an attribute such as Pixel Padding Value, which writers encode differently.

        Its VR (US or SS) may contradict Pixel Representation. A value that does not fit into the stored bits was
        written like a sample, with all bits allocated.
        """
        word = np.array([encoded & 0xFFFF])
        stored = int(_as_signed(word, 16)[0] if self.signed else word[0])
        if self.smallest <= stored <= self.largest:
            return stored
        return int(replace(self, clipped=False).values(word & ((1 << self.allocated) - 1))[0])


def _as_signed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers of `bits` bits, reinterpreted as two's complement; int32."""
    unused = 32 - bits
    return (numbers.astype(np.uint32) << np.uint32(unused)).view(np.int32) >> unused


@dataclass(frozen=True)
class PixelData:
    """The only frame of a data set, undecoded, with checked attributes and codestream header."""

    data: bytes
    syntax: uid.UID
    height: int
    width: int
    samples: int  # 1 or 3
    photometric: str
    planar: int  # Planar Configuration
    vr: str
    bits: SampleBits
    coded: bytes | None = None  # the frame's codestream, if it is compressed
    codestream: Codestream | None = None  # its header; None for RLE

    @property
    def sample_bytes(self) -> int:
        return self.height * self.width * self.samples * self.bits.allocated // 8

    @property
    def memory_bytes(self) -> int:
        """Estimated peak of decoding and display."""
        if self.codestream is not None:
            return self.codestream.memory_bytes
        return (2 if self.coded is None else 4) * self.sample_bytes

    @property
    def max_halvings(self) -> int:
        """How often the resolution may be halved on decoding; 0 if samples are not simply unsigned stored values."""
        bits = self.bits
        is_plain = bits.allocated == bits.stored == bits.high + 1 and not bits.signed
        return self.codestream.max_halvings if self.codestream is not None and is_plain else 0

    def decode_reduced(self, halvings: int) -> np.ndarray | None:
        """`decode` with sides divided by 2 ** halvings and rounded up; None: only `decode` gives the samples."""
        assert self.coded is not None
        assert self.codestream is not None
        return decode_reduced(self.coded, self.codestream, halvings)

    def decode(self) -> np.ndarray:
        """Samples as unsigned numbers: (height, width) of 8 or 16 bits, or (height, width, 3) RGB of 8 bits.

        Raises:
            ImageRejectedError: the codec, which the message names, cannot decode them.
        """
        if self.codestream is not None and self.coded is not None:
            samples = decode_codestream(self.coded, self.codestream)
            if self.samples == 1:
                return samples[..., 0]
            jfif = self.codestream.format in ("JPEG", "JPEG lossless") and self.coded.startswith(b"JFIF", 6)
            luminance = self.photometric in ("YBR_FULL", "YBR_FULL_422") or jfif
            return convert_color_space(samples, "YBR_FULL", "RGB") if luminance else samples
        if self.coded is not None:
            planes = decode_rle(self.coded, self.height * self.width, self.samples, self.bits.allocated // 8)
            return self._uncompressed(planes.tobytes(), uid.ExplicitVRLittleEndian, planar=1)
        return self._uncompressed(self.data, self.syntax, self.planar)

    def _uncompressed(self, data: bytes, syntax: uid.UID, planar: int) -> np.ndarray:
        """Samples with all bits unchanged: pydicom's own correction assumes that High Bit is Bits Stored − 1."""
        options: dict[str, Any] = {
            "rows": self.height,
            "columns": self.width,
            "samples_per_pixel": self.samples,
            "photometric_interpretation": self.photometric,
            "planar_configuration": planar,
            "bits_allocated": self.bits.allocated,
            "bits_stored": self.bits.allocated,
            "pixel_representation": 0,
            "pixel_keyword": "PixelData",
            "pixel_vr": self.vr,
            "number_of_frames": 1,
            "allow_excess_frames": False,
            "correct_unused_bits": False,
            "view_only": True,
        }
        array, _ = get_decoder(syntax).as_array(data, index=0, raw=self.samples == 1, **options)
        return array.astype(array.dtype.newbyteorder("="), copy=False)


def read_pixel_data(dataset: Dataset) -> PixelData:
    """The pixel data of a data set whose file meta information contains the transfer syntax.

    Raises:
        ImageRejectedError: attributes, pixel data or codestream are missing, contradict each other or are not those
            of an X-ray, or decoding would take too much memory.
    """
    height, width = number(dataset, "Rows"), number(dataset, "Columns")
    if height is None or width is None:
        raise ImageRejectedError("damaged DICOM: Rows or Columns are missing")
    check_size(int(height), int(width))
    frames = number(dataset, "NumberOfFrames") or 1
    if frames > 1:
        raise ImageRejectedError(f"multi-frame image: a DICOM file with {frames:.0f} frames")
    syntax = dataset.file_meta.TransferSyntaxUID
    data = value(dataset, "PixelData")
    pixel_data = PixelData(
        data=data if isinstance(data, bytes) else b"",
        syntax=syntax,
        height=int(height),
        width=int(width),
        samples=int(number(dataset, "SamplesPerPixel") or 1),
        photometric=code(dataset, "PhotometricInterpretation"),
        planar=int(number(dataset, "PlanarConfiguration") == 1),
        vr=dataset["PixelData"].VR,
        bits=_sample_bits(dataset),
    )
    _check_kind(pixel_data)
    if not syntax.is_encapsulated:
        if len(pixel_data.data) < pixel_data.sample_bytes:
            raise ImageRejectedError("truncated DICOM: the pixel data are shorter than Rows x Columns require")
    else:
        pixel_data = _with_codestream(pixel_data)
    check_decoding_bytes(pixel_data.memory_bytes)
    return pixel_data


def _sample_bits(dataset: Dataset) -> SampleBits:
    """Absent attributes default to all bits allocated."""
    allocated = int(number(dataset, "BitsAllocated") or 0)
    stored = int(number(dataset, "BitsStored") or allocated)
    return SampleBits(
        allocated=allocated,
        stored=stored,
        high=int(number(dataset, "HighBit") or stored - 1),
        signed=number(dataset, "PixelRepresentation") == 1,
        clipped=dataset.file_meta.TransferSyntaxUID in _LOSSY,
    )


def _check_kind(pixel_data: PixelData) -> None:
    bits, photometric = pixel_data.bits, pixel_data.photometric
    gray = pixel_data.samples == 1 and photometric in ("MONOCHROME1", "MONOCHROME2") and bits.allocated in (8, 16)
    color = pixel_data.samples == 3 and photometric.startswith(("RGB", "YBR")) and bits.allocated == 8
    if not (gray or color):
        raise ImageRejectedError(
            "unsupported DICOM pixels: expected MONOCHROME1 or MONOCHROME2 with 8 or 16 bits allocated"
        )
    if not 0 < bits.stored <= bits.high + 1 <= bits.allocated:
        raise ImageRejectedError("damaged DICOM: Bits Stored and High Bit contradict Bits Allocated")
    try:
        get_decoder(pixel_data.syntax)
    except NotImplementedError:
        raise ImageRejectedError(
            "unsupported DICOM: there is no decoder for the transfer syntax; convert the file"
        ) from None


def _with_codestream(pixel_data: PixelData) -> PixelData:
    frame = get_frame(pixel_data.data, 0, number_of_frames=1)
    if pixel_data.syntax == uid.RLELossless:
        if _RLE_RATIO * len(frame) < pixel_data.sample_bytes:
            raise ImageRejectedError("truncated DICOM pixels: the RLE data are shorter than Rows x Columns require")
        return replace(pixel_data, coded=frame)
    header = read_header(frame)
    if (header.height, header.width) != (pixel_data.height, pixel_data.width):
        raise ImageRejectedError("damaged DICOM: Rows and Columns contradict the pixel data")
    if header.samples != pixel_data.samples or header.bits > pixel_data.bits.allocated:
        raise ImageRejectedError("damaged DICOM: Samples per Pixel or Bits Allocated contradict the pixel data")
    bits = replace(pixel_data.bits, allocated=header.bits)
    if header.bits <= bits.high:  # decoded samples begin at bit 0, regardless of High Bit
        stored = min(bits.stored, header.bits)
        bits = replace(bits, stored=stored, high=stored - 1)
    return replace(pixel_data, coded=frame, codestream=header, bits=bits)
