"""More than 50 kinds of odd and broken image files, made by hand, as they occur in old archives."""

from __future__ import annotations

import io
import struct
import zlib
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pydicom import Dataset, FileDataset, Sequence, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

HEIGHT, WIDTH = 96, 80
DIGITAL_XRAY = "1.2.840.10008.5.1.4.1.1.1.1"


@dataclass(frozen=True)
class OddFile:
    """`reason` is part of the message with which the file must be rejected; None: it must be decoded."""

    name: str
    data: bytes
    reason: str | None


def odd_files() -> list[OddFile]:
    return [*_odd_pictures(), *_broken_pictures(), *_no_pictures(), *_odd_dicoms(), *_broken_dicoms()]


def radiograph(bits: int = 8, seed: int = 0) -> np.ndarray:
    """A smooth noisy picture (96, 80) that uses all `bits`, uint8 or uint16."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    shade = np.sin(x / 11) + np.cos(y / 17) + np.random.default_rng(seed).normal(0, 0.1, (HEIGHT, WIDTH))
    unit = (shade - shade.min()) / np.ptp(shade)
    return np.rint(unit * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(stream, kind, **options)
    return stream.getvalue()


def colors() -> np.ndarray:
    few = np.random.default_rng(1).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    return few.repeat(8, 0).repeat(8, 1)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(height: int, width: int) -> bytes:
    """A complete PNG whose header declares a larger size than its few bytes of pixels have."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def dataset(pixels: np.ndarray, **tags: Any) -> Dataset:
    """A digital X-ray's dataset, uncompressed; `tags` add, replace or (None) remove."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName = DIGITAL_XRAY, "1.2.3.4", "Doe^Jane"
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    for keyword, value in tags.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def dicom(ds: Dataset, syntax: uid.UID = uid.ExplicitVRLittleEndian, codestream: bytes = b"") -> bytes:
    """Write a data set as a DICOM file, compressed if pydicom can, or with the given codestream."""
    encoding = {"is_little_endian": syntax.is_little_endian, "is_implicit_VR": syntax.is_implicit_VR}
    file = FileDataset("", deepcopy(ds), preamble=bytes(128), file_meta=FileMetaDataset(), **encoding)
    file.file_meta.TransferSyntaxUID = syntax
    if codestream:
        file.PixelData = encapsulate([codestream])
        file["PixelData"].VR = "OB"
    elif syntax.is_encapsulated:
        file.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        file.compress(syntax, generate_instance_uid=False)
    elif "PixelData" in file:
        file["PixelData"].VR = "OW"
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def run_lengths(samples: np.ndarray) -> bytes:
    """DICOM's run-length encoding (PS3.5 annex G) of gray samples (H, W), with literal runs only."""
    itemsize = samples.dtype.itemsize
    planes = samples.astype(samples.dtype.newbyteorder(">")).reshape(-1, 1).view(np.uint8).T
    segments = []
    for plane in planes:
        runs = [plane[first : first + 128] for first in range(0, plane.size, 128)]
        segment = b"".join(bytes([len(run) - 1]) + run.tobytes() for run in runs)
        segments.append(segment + bytes(len(segment) % 2))
    starts = np.cumsum([64, *map(len, segments)])[:-1]
    return struct.pack("<16I", itemsize, *starts, *[0] * (15 - itemsize)) + b"".join(segments)


def lossless_jpeg(pixels: np.ndarray, bits: int) -> bytes:
    """JPEG lossless, first-order prediction (ITU T.81 annex H), with 17 Huffman codes of 5 bits."""
    values = pixels.astype(int)
    predicted = np.roll(values, 1, axis=1)
    predicted[1:, 0], predicted[0, 0] = values[:-1, 0], 1 << (bits - 1)
    coded = ""
    for difference in (values - predicted).ravel():
        size = int(abs(difference)).bit_length()
        extra = difference if difference > 0 else difference + (1 << size) - 1
        coded += f"{size:05b}" + (f"{extra:0{size}b}" if size else "")
    coded += "1" * (-len(coded) % 8)
    body = int(coded, 2).to_bytes(len(coded) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = struct.pack(">BHHBBBB", bits, *pixels.shape, 1, 1, 0x11, 0)
    table = b"\0" + bytes([0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))
    scan = bytes([1, 1, 0, 1, 0, 0])
    parts = [(0xC3, frame), (0xC4, table), (0xDA, scan)]
    segments = b"".join(struct.pack(">BBH", 0xFF, marker, len(b) + 2) + b for marker, b in parts)
    return b"\xff\xd8" + segments + body + b"\xff\xd9"


def _odd_pictures() -> list[OddFile]:
    gray, deep = radiograph(), radiograph(16)
    rgb = np.stack([gray] * 3, -1)
    marked = rgb.copy()
    marked[:8, :8] = (255, 255, 0)
    alpha = np.full_like(gray, 255)
    alpha[::2] = 0
    palette = Image.fromarray(gray // 64)
    palette = Image.frombytes("P", palette.size, palette.tobytes())
    palette.putpalette([v for g in (0, 80, 160, 255) for v in (g, g, g)])
    rotated = Image.Exif()
    rotated[0x0112] = 6
    pictures = {
        "gray.png": encoded(gray),
        "deep.png": encoded(deep),
        "two_values.png": encoded(Image.fromarray(gray > 128)),
        "two_bits.png": encoded(palette, bits=2),
        "palette.png": encoded(palette),
        "rgb_gray.png": encoded(rgb),
        "rgba.png": encoded(np.dstack([rgb, alpha])),
        "gray_alpha.png": encoded(Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])),
        "yellow_marker.png": encoded(marked),
        "text_in_front.png": encoded(gray)[:33] + chunk(b"tEXt", b"Comment\0left") + encoded(gray)[33:],
        "rubbish_behind.png": encoded(gray) + bytes(100),
        "gray.jpg": encoded(gray, "JPEG"),
        "rgb.jpg": encoded(rgb, "JPEG"),
        "progressive.jpg": encoded(gray, "JPEG", progressive=True),
        "exif_rotated.jpg": encoded(gray, "JPEG", exif=rotated),
        "zeros_behind.jpg": encoded(gray, "JPEG") + bytes(512),
        "png_named.dcm": encoded(gray),
        "no_suffix": encoded(gray, "JPEG"),
    }
    return [OddFile(name, data, None) for name, data in pictures.items()]


def _broken_pictures() -> list[OddFile]:
    gray = radiograph()
    png, jpeg = encoded(gray), encoded(gray, "JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    few = b"\x89PNG\r\n\x1a\n" + png[8:33] + chunk(b"IDAT", zlib.compress(bytes(200))) + chunk(b"IEND", b"")
    tall = jpeg.index(b"\xff\xc0") + 5
    animated = png[:33] + chunk(b"acTL", struct.pack(">II", 2, 0)) + png[33:]
    cmyk = Image.fromarray(np.stack([gray] * 4, -1), "CMYK")
    return [
        OddFile("empty.png", b"", "empty file"),
        OddFile("cut_in_magic.png", png[:5], "unsupported file type: unknown"),
        OddFile("cut_in_header.png", png[:20], "truncated PNG"),
        OddFile("cut_in_half.png", png[: len(png) // 2], "truncated PNG"),
        OddFile("cut_before_end.png", png[:-12], "truncated PNG"),
        OddFile("bad_checksum.png", bytes(flipped), "checksum"),
        OddFile("few_pixels.png", few, "damaged PNG"),
        OddFile("headless.png", png[:8] + png[33:], "damaged PNG"),
        OddFile("bomb.png", png_claiming(60_000, 60_000), "too large"),
        OddFile("no_columns.png", png_claiming(64, 0), "zero size"),
        OddFile("one_pixel.png", encoded(gray[:1, :1]), "too small"),
        OddFile("animated.png", animated, "multi-frame"),
        OddFile("blank.png", encoded(np.full_like(gray, 128)), "blank"),
        OddFile("photograph.png", encoded(colors()), "color image"),
        OddFile("photograph.jpg", encoded(colors(), "JPEG"), "color image"),
        OddFile("cmyk.jpg", encoded(cmyk, "JPEG"), "CMYK"),
        OddFile("cut_in_half.jpg", jpeg[: len(jpeg) // 2], "truncated JPEG"),
        OddFile("cut_in_header.jpg", jpeg[:40], "truncated JPEG"),
        OddFile("cut_before_end.jpg", jpeg[:-2], "truncated JPEG"),
        OddFile("zeroed_tail.jpg", jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "truncated JPEG"),
        OddFile("bomb.jpg", jpeg[:tall] + b"\xff\xff\xff\xff" + jpeg[tall + 4 :], "too large"),
        OddFile("lossless.jpg", lossless_jpeg(gray, 8), "unsupported JPEG"),
        OddFile("no_frame.jpg", b"\xff\xd8\xff\xe0" + jpeg[2:4] * 8, "JPEG"),
    ]


def _no_pictures() -> list[OddFile]:
    gray = radiograph()
    return [
        OddFile("error_page.dcm", b"<!DOCTYPE html><title>404 Not Found</title>", "HTML page"),
        OddFile("error_named.png", b"\n<html><body>Access denied</body></html>", "HTML page"),
        OddFile("denied.xml.png", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "text"),
        OddFile("text.dcm", "Röntgen, Aufnahme 1–20\n".encode(), "text"),
        OddFile("document.dcm", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "PDF"),
        OddFile("zipped.dcm", b"PK\x03\x04" + bytes(60), "ZIP"),
        OddFile("gzipped.dcm", b"\x1f\x8b\x08" + bytes(60), "gzip"),
        OddFile("mask.gif", encoded(gray, "GIF"), "GIF"),
        OddFile("scan.tif", encoded(gray, "TIFF"), "TIFF"),
        OddFile("scan.bmp", encoded(gray, "BMP"), "BMP"),
        OddFile("scan.webp", encoded(gray, "WEBP"), "WebP"),
        OddFile("zeros.dcm", bytes(4096), "zero bytes"),
        OddFile("noise.png", b"\xfe" + np.random.default_rng(2).bytes(999), "unknown"),
    ]


def _odd_dicoms() -> list[OddFile]:
    gray, twelve, deep = radiograph(), radiograph(12), radiograph(16)
    ds12 = dataset(twelve, BitsStored=12, HighBit=11)
    signed = dataset((twelve.astype(np.int16) - 2048), RescaleSlope="2", RescaleIntercept="1024")
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [4096, 0, 16], np.arange(0, 65536, 16, np.uint16).tobytes()
    jpeg = encoded(gray, "JPEG")
    explicit = dicom(ds12)
    files = {
        "explicit.dcm": explicit,
        "implicit.dcm": dicom(ds12, uid.ImplicitVRLittleEndian),
        "big_endian.dcm": dicom(dataset(twelve.astype(">u2"), BitsStored=12, HighBit=11), uid.ExplicitVRBigEndian),
        "jpeg_baseline.dcm": dicom(dataset(gray), uid.JPEGBaseline8Bit, jpeg),
        "jpeg_lossless.dcm": dicom(ds12, uid.JPEGLosslessSV1, lossless_jpeg(twelve, 12)),
        "jpeg_ls.dcm": dicom(ds12, uid.JPEGLSLossless),
        "jpeg_2000.dcm": dicom(ds12, uid.JPEG2000Lossless),
        "rle.dcm": dicom(ds12, uid.RLELossless),
        "deflated.dcm": dicom(ds12, uid.DeflatedExplicitVRLittleEndian),
        "eight_bits.dcm": dicom(dataset(gray)),
        "sixteen_bits.dcm": dicom(dataset(deep)),
        "signed_rescaled.dcm": dicom(signed),
        "monochrome1.dcm": dicom(dataset(gray, PhotometricInterpretation="MONOCHROME1")),
        "window.dcm": dicom(dataset(twelve, WindowCenter="2048", WindowWidth="3000")),
        "two_windows.dcm": dicom(dataset(twelve, WindowCenter=["2048", "9"], WindowWidth=["3000", "9"])),
        "zero_window.dcm": dicom(dataset(twelve, WindowCenter="0", WindowWidth="0")),
        "window_elsewhere.dcm": dicom(dataset(twelve, WindowCenter="-5000", WindowWidth="10")),
        "voi_lut.dcm": dicom(dataset(twelve, VOILUTSequence=Sequence([lut]))),
        "modality_lut.dcm": dicom(dataset(twelve, ModalityLUTSequence=Sequence([lut]))),
        "padded.dcm": dicom(dataset(deep, PixelPaddingValue=65535)),
        "no_preamble.dcm": explicit[132:],
        "no_meta.dcm": _bare(ds12),
        "dicom_named.png": explicit,
        "rgb_gray.dcm": dicom(dataset(np.dstack([gray] * 3), **_RGB)),
    }
    return [OddFile(name, data, None) for name, data in files.items()]


def _broken_dicoms() -> list[OddFile]:
    gray, twelve = radiograph(), radiograph(12)
    whole, ls = dicom(dataset(twelve)), dicom(dataset(twelve), uid.JPEGLSLossless)
    baseline = encoded(gray, "JPEG")
    no_pixels = {"PixelData": None, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}
    torn = dicom(dataset(gray), uid.JPEGBaseline8Bit, baseline[: len(baseline) // 2])
    other_size = dicom(dataset(gray, Rows=HEIGHT * 2), uid.JPEGBaseline8Bit, baseline)
    two = dataset(np.concatenate([gray, gray]), Rows=HEIGHT, NumberOfFrames="2")
    j2k = dicom(dataset(twelve, Rows=HEIGHT), uid.JPEG2000Lossless)
    return [
        OddFile("cut_in_meta.dcm", whole[:150], "without pixel data"),
        OddFile("cut_in_header.dcm", whole[:400], "without pixel data"),
        OddFile("cut_in_pixels.dcm", whole[: len(whole) // 2], "truncated DICOM"),
        OddFile("cut_by_a_row.dcm", whole[: -2 * WIDTH], "truncated DICOM"),
        OddFile("cut_in_fragment.dcm", ls[: len(ls) // 2], "truncated DICOM"),
        OddFile("torn_jpeg.dcm", torn, "truncated JPEG"),
        OddFile("torn_jpeg_2000.dcm", j2k.replace(b"\xff\xd9", b"\0\0"), "JPEG 2000 codestream has no end marker"),
        OddFile("other_size.dcm", other_size, "contradict"),
        OddFile("rows_missing.dcm", dicom(dataset(gray, Rows=None)), "Rows or Columns are missing"),
        OddFile("no_columns.dcm", dicom(dataset(gray, Columns=0)), "zero size"),
        OddFile("bomb.dcm", dicom(dataset(gray, Rows=65535, Columns=65535)), "too large"),
        OddFile("more_rows.dcm", dicom(dataset(gray, Rows=2 * HEIGHT)), "truncated DICOM"),
        OddFile("two_frames.dcm", dicom(two), "multi-frame"),
        OddFile("no_pixels.dcm", dicom(dataset(gray, PixelData=None)), "without pixel data"),
        OddFile("report.dcm", dicom(dataset(gray, **no_pixels)), "Encapsulated PDF"),
        OddFile("photograph.dcm", dicom(dataset(colors(), **_RGB)), "color image"),
        OddFile("palette.dcm", dicom(dataset(gray, PhotometricInterpretation="PALETTE COLOR")), "unsupported"),
        OddFile("one_bit.dcm", dicom(dataset(gray, BitsAllocated=1, BitsStored=1, HighBit=0)), "unsupported"),
        OddFile("bits.dcm", dicom(dataset(gray, BitsStored=12, HighBit=11)), "Bits Stored"),
        OddFile("video.dcm", dicom(dataset(gray), uid.MPEG2MPML, b"\0\0\1\xb3" + bytes(60)), "no decoder"),
        OddFile("blank.dcm", dicom(dataset(np.full_like(gray, 7))), "blank"),
        OddFile("all_padding.dcm", dicom(dataset(np.zeros_like(gray), PixelPaddingValue=0)), "padding"),
    ]


_RGB = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}


def _bare(ds: Dataset) -> bytes:
    stream = io.BytesIO()
    ds.save_as(stream, implicit_vr=True, little_endian=True)
    return stream.getvalue()
