"""Each transfer syntax is decoded exactly: as pydicom decodes real files, and to what was compressed."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import cv2
import jpeg_ls
import numpy as np
import pytest
from imagecodecs import htj2k_encode, jpeg2k_encode, jpeg8_decode, jpeg8_encode, jpegls_encode
from numpy.testing import assert_array_equal
from pydicom import dcmread, uid
from pydicom.data import get_testdata_file
from pydicom.pixels.utils import pixel_array
from scipy.fft import dctn, idctn

from cxr.errors import ImageRejectedError
from cxr.imaging.dicom_pixels import PixelData, read_pixel_data
from tests.odd_files import dataset, dicom, lossless_jpeg, radiograph

GRAY, TWELVE, DEEP = radiograph(), radiograph(12), radiograph(16)
RGB = np.dstack([GRAY, GRAY // 2, 255 - GRAY])
COLOR = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}


def stored_values(pixel_data: PixelData) -> np.ndarray:
    samples = pixel_data.decode()
    return pixel_data.bits.values(samples) if samples.ndim == 2 else samples


def decoded(data: bytes) -> np.ndarray:
    return stored_values(read_pixel_data(dcmread(io.BytesIO(data))))


def by_pydicom(data: bytes, plugin: str) -> np.ndarray:
    ds = dcmread(io.BytesIO(data))
    return pixel_array(ds, raw=ds.SamplesPerPixel == 1, decoding_plugin=plugin)


# ---- Real files, from pydicom's own tests


@pytest.mark.parametrize(
    ("name", "plugin"),
    [
        ("SC_rgb_jpeg_gdcm.dcm", "pylibjpeg"),  # JPEG lossless
        ("MR_small_jpeg_ls_lossless.dcm", "pyjpegls"),
        ("SC_rgb_jls_lossy_line.dcm", "pyjpegls"),
        ("SC_rgb_jls_lossy_sample.dcm", "pyjpegls"),
        ("MR_small_jp2klossless.dcm", "pylibjpeg"),
        ("J2K_pixelrep_mismatch.dcm", "pylibjpeg"),
        ("GDCMJ2K_TextGBR.dcm", "pylibjpeg"),
        ("examples_jpeg2k.dcm", "pylibjpeg"),
        ("JPEG2000.dcm", "pylibjpeg"),
        ("693_J2KI.dcm", "pylibjpeg"),
        ("SC_rgb_gdcm_KY.dcm", "pylibjpeg"),
        ("MR_small_RLE.dcm", "pydicom"),
        ("SC_rgb_rle.dcm", "pydicom"),
        ("SC_rgb_jpeg_dcmtk.dcm", "pillow"),  # JPEG baseline, as are the following
        ("SC_rgb_dcmtk_+eb+cr.dcm", "pillow"),
        ("SC_rgb_dcmtk_+eb+cy+n1.dcm", "pillow"),
        ("SC_rgb_dcmtk_+eb+cy+s2.dcm", "pillow"),
        ("SC_rgb_dcmtk_+eb+cy+s4.dcm", "pillow"),
    ],
)
def test_real_file_is_decoded_as_by_pydicom(name: str, plugin: str) -> None:
    data = Path(str(get_testdata_file(name, download=False))).read_bytes()
    assert_array_equal(decoded(data), by_pydicom(data, plugin))


def test_real_xray_in_jpeg_baseline_is_decoded_as_by_pydicom(real_data: Path) -> None:
    for path in (real_data / "siim" / "dicom").glob("*.dcm"):
        data = path.read_bytes()
        assert_array_equal(decoded(data), by_pydicom(data, "pillow"))


def test_real_file_in_12_bit_jpeg_differs_from_pydicom_by_one_level() -> None:
    """Decoders may round the inverse DCT differently; see the test of its exact values below."""
    data = Path(str(get_testdata_file("JPGExtended.dcm", download=False))).read_bytes()
    assert np.abs(decoded(data) - by_pydicom(data, "pylibjpeg").astype(int)).max() == 1


# ---- Compressed here


def test_a_real_xray_survives_every_lossless_syntax(real_data: Path) -> None:
    path = min((real_data / "chestxray14" / "images").glob("*.png"))
    gray = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert gray is not None
    twelve = cv2.resize(gray, None, fx=0.6, fy=0.5, interpolation=cv2.INTER_AREA).astype(np.uint16) * 16 + 7
    codestreams = {
        uid.JPEGLossless: jpeg8_encode(twelve, lossless=True, predictor=4, bitspersample=12),
        uid.JPEGLosslessSV1: jpeg8_encode(twelve, lossless=True, predictor=1, bitspersample=12),
        uid.JPEGLSLossless: jpegls_encode(twelve),
        uid.JPEG2000Lossless: jpeg2k_encode(twelve, 0, codecformat="j2k", reversible=True, bitspersample=12),
        uid.HTJ2KLossless: htj2k_encode(twelve, reversible=True),
        uid.HTJ2KLosslessRPCL: htj2k_encode(twelve, reversible=True, tile=(256, 256), tlm=True),
        uid.RLELossless: b"",  # by pydicom
    }
    ds = dataset(twelve, BitsStored=12, HighBit=11)
    for syntax, codestream in codestreams.items():
        data = dicom(ds, syntax, codestream)
        assert_array_equal(decoded(data), twelve, err_msg=syntax.name)
        assert_array_equal(decoded(data), by_pydicom(data, ""), err_msg=syntax.name)


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("pixels", [GRAY, TWELVE, DEEP, RGB], ids=["8 bits", "12 bits", "16 bits", "color"])
def test_lossless_jpeg_with_every_predictor(pixels: np.ndarray, predictor: int) -> None:
    bits = 12 if pixels is TWELVE else 8 * pixels.itemsize
    codestream = jpeg8_encode(pixels, lossless=True, predictor=predictor, bitspersample=bits)
    tags = COLOR if pixels is RGB else {"BitsStored": bits, "HighBit": bits - 1}
    assert_array_equal(decoded(dicom(dataset(pixels, **tags), uid.JPEGLossless, codestream)), pixels)


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["by plane", "by line", "by pixel"])
def test_jpeg_ls_with_every_interleave_mode(mode: int) -> None:
    codestream = bytes(jpeg_ls.encode_array(RGB if mode else np.moveaxis(RGB, -1, 0).copy(), interleave_mode=mode))
    assert_array_equal(decoded(dicom(dataset(RGB, **COLOR), uid.JPEGLSLossless, codestream)), RGB)


def signed_codestreams() -> dict[uid.UID, bytes]:
    signed = TWELVE.astype(np.int16) - 2048
    return {
        uid.JPEGLosslessSV1: jpeg8_encode(signed.view(np.uint16), lossless=True, predictor=1, bitspersample=16),
        uid.JPEGLSLossless: jpegls_encode(signed.view(np.uint16)),
        uid.JPEG2000Lossless: jpeg2k_encode(signed, 0, codecformat="j2k", reversible=True),
        uid.HTJ2KLossless: htj2k_encode(signed, reversible=True),
    }


@pytest.mark.parametrize("syntax", signed_codestreams(), ids=lambda syntax: syntax.name)
def test_signed_values_keep_their_sign(syntax: uid.UID) -> None:
    signed = TWELVE.astype(np.int16) - 2048
    assert_array_equal(decoded(dicom(dataset(signed), syntax, signed_codestreams()[syntax])), signed)


@pytest.mark.parametrize("syntax", [uid.JPEG2000, uid.HTJ2K], ids=lambda syntax: syntax.name)
def test_lossy_jpeg_2000_is_decoded_as_by_pydicom(syntax: uid.UID) -> None:
    lossy = {
        uid.JPEG2000: jpeg2k_encode(DEEP, 60, codecformat="j2k", reversible=False),
        uid.HTJ2K: htj2k_encode(DEEP, 0.001, reversible=False),
    }
    data = dicom(dataset(DEEP), syntax, lossy[syntax])
    assert_array_equal(decoded(data), by_pydicom(data, "pylibjpeg"))
    assert 0 < np.abs(decoded(data) - DEEP.astype(int)).max() < 1000


def test_the_boxes_of_a_jp2_file_are_skipped() -> None:
    file = jpeg2k_encode(GRAY, 0, codecformat="jp2", reversible=True)
    assert file.startswith(b"\0\0\0\x0cjP  ")
    assert_array_equal(decoded(dicom(dataset(GRAY), uid.JPEG2000Lossless, file)), GRAY)


def test_jpeg_2000_with_different_components_is_rejected() -> None:
    codestream = bytearray(jpeg2k_encode(RGB, 0, codecformat="j2k", reversible=True))
    codestream[46] = 2  # horizontal subsampling of the second component
    with pytest.raises(ImageRejectedError, match="JPEG 2000 with subsampled or different components"):
        decoded(dicom(dataset(RGB, **COLOR), uid.JPEG2000Lossless, bytes(codestream)))


# ---- The inverse DCT, against its exact values

ZIGZAG = sorted(range(64), key=lambda k: (sum(divmod(k, 8)), k // 8 if sum(divmod(k, 8)) % 2 else k % 8))


def dct_jpeg(coefficients: np.ndarray, step: int, bits: int) -> bytes:
    """A sequential JPEG (T.81 annex F) of quantized coefficients (rows, columns, 8, 8); codes have equal lengths."""
    sizes, symbols = range(16), [0, *(run << 4 | size for run in range(16) for size in range(1, 15)), 0xF0]
    place = {symbol: index for index, symbol in enumerate(symbols)}

    def amplitude(value: int) -> tuple[int, str]:
        size = abs(value).bit_length()
        return size, f"{value if value > 0 else value + (1 << size) - 1:0{size}b}" if size else ""

    coded, previous = [], 0
    for block in coefficients.reshape(-1, 64):
        values = block[ZIGZAG].tolist()
        size, extra = amplitude(values[0] - previous)
        previous, run = values[0], 0
        coded.append(f"{size:05b}{extra}")
        for value in np.trim_zeros(values[1:], "b"):
            if value == 0:
                run += 1
                continue
            size, extra = amplitude(value)
            coded += [f"{place[0xF0]:09b}"] * (run // 16) + [f"{place[run % 16 << 4 | size]:09b}{extra}"]
            run = 0
        if not values[63]:
            coded.append(f"{place[0]:09b}")
    text = "".join(coded)
    body = int(text + "1" * (-len(text) % 8), 2).to_bytes(-(-len(text) // 8), "big").replace(b"\xff", b"\xff\0")
    height, width = 8 * coefficients.shape[0], 8 * coefficients.shape[1]
    parts = [
        (0xDB, b"\0" + bytes([step]) * 64),
        (0xC1, struct.pack(">BHHBBBB", bits, height, width, 1, 1, 0x11, 0)),
        (0xC4, b"\0" + bytes([0] * 4 + [len(sizes)] + [0] * 11) + bytes(sizes)),
        (0xC4, b"\x10" + bytes([0] * 8 + [len(symbols)] + [0] * 7) + bytes(symbols)),
        (0xDA, bytes([1, 1, 0, 0, 63, 0])),
    ]
    segments = b"".join(struct.pack(">BBH", 0xFF, marker, len(part) + 2) + part for marker, part in parts)
    return b"\xff\xd8" + segments + body + b"\xff\xd9"


@pytest.mark.parametrize(("bits", "kind"), [(8, "smooth"), (12, "smooth"), (12, "edges")])
def test_jpeg_is_decoded_within_a_level_of_the_exact_inverse_dct(bits: int, kind: str) -> None:
    """This holds even at the sharpest edges, such as burned-in letters, where pydicom's decoder is 2 levels off."""
    largest = (1 << bits) - 1
    pixels = radiograph(bits)
    if kind == "edges":
        pixels = np.random.default_rng(0).choice([0, largest], pixels.shape)
    blocks = pixels.reshape(12, 8, 10, 8).swapaxes(1, 2) - float(1 << (bits - 1))
    step = 3
    coefficients = np.rint(dctn(blocks, axes=(2, 3), norm="ortho") / step).astype(int)
    exact = idctn(step * coefficients, axes=(2, 3), norm="ortho") + (1 << (bits - 1))
    exact = np.clip(exact.swapaxes(1, 2).reshape(96, 80), 0, largest)
    tags = {"BitsStored": bits, "HighBit": bits - 1}
    ds = dataset(pixels.astype(np.uint8 if bits == 8 else np.uint16), **tags)
    data = dicom(ds, uid.JPEGExtended12Bit, dct_jpeg(coefficients, step, bits))
    assert np.abs(decoded(data) - exact).max() < (1.1 if kind == "edges" else 0.75)
    if kind == "edges":
        assert np.abs(by_pydicom(data, "pylibjpeg") - exact).max() > 2


# ---- Damage inside a lossless JPEG


def test_more_rows_than_a_lossless_jpeg_has_are_rejected() -> None:
    """The header and the data set agree on a wrong size, which the decoder would fill with gray."""
    codestream = lossless_jpeg(TWELVE, 12)
    size = struct.pack(">2H", *TWELVE.shape)
    for height in (TWELVE.shape[0] + 4, TWELVE.shape[0] - 4):
        wrong = codestream.replace(size, struct.pack(">2H", height, TWELVE.shape[1]))
        assert jpeg8_decode(wrong).shape == (height, TWELVE.shape[1])
        data = dicom(dataset(TWELVE, Rows=height, BitsStored=12, HighBit=11), uid.JPEGLosslessSV1, wrong)
        with pytest.raises(ImageRejectedError, match="decodes to more or fewer bits"):
            decoded(data)


def test_damage_inside_a_lossless_jpeg_is_often_detected() -> None:
    """Decoders that are out of step may find their way back after as many samples as the damaged codes had."""
    codestream = jpeg8_encode(TWELVE, lossless=True, predictor=1, bitspersample=12)
    rng, detected = np.random.default_rng(0), 0
    for place in rng.integers(len(codestream) // 4, len(codestream) - 100, 40):
        damaged = bytearray(codestream)
        damaged[place : place + 50] = rng.integers(0, 255, 50, np.uint8).tobytes()
        try:
            decoded(dicom(dataset(TWELVE, BitsStored=12, HighBit=11), uid.JPEGLosslessSV1, bytes(damaged)))
        except ImageRejectedError:
            detected += 1
    assert detected >= 20


def test_a_lossless_jpeg_with_a_restart_interval_is_decoded() -> None:
    codestream = lossless_jpeg(TWELVE, 12)
    interval = struct.pack(">BBHH", 0xFF, 0xDD, 4, TWELVE.size)
    ds = dataset(TWELVE, BitsStored=12, HighBit=11)
    data = dicom(ds, uid.JPEGLossless, codestream[:2] + interval + codestream[2:])
    assert_array_equal(decoded(data), TWELVE)
