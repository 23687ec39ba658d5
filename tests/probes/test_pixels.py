"""Decoding, hashing and viewing: every kind of good and bad image file, with its exact outcome."""

import hashlib
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from probes.pictures import encode, picture, png

from polyray.errors import DataError
from polyray.probes.images import decode, pixel_hash, view
from polyray.probes.pixels import MAX_PIXELS

SMOOTH = np.stack(np.meshgrid(np.arange(0, 240, 6), np.arange(0, 200, 5)), axis=2).astype(np.uint8)
SMOOTH = np.concatenate([SMOOTH, 255 - SMOOTH[:, :, :1]], axis=2)

FORMATS = {
    "jpeg": ("JPEG", {}),
    "progressive jpeg": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "lzw tiff": ("TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", {}),
}


@pytest.mark.parametrize("name", ["png", "bmp", "lossless webp", "tiff", "lzw tiff", "ppm"])
def test_lossless_formats_give_back_the_pixels(name: str) -> None:
    format, options = FORMATS[name]
    rgb = picture(1, 11, 6)
    out = decode(encode(rgb, format, **options))
    assert out.dtype == np.uint8
    assert np.array_equal(out, rgb)


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_image_is_refused_or_whole(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Cut anywhere, a file is refused, unless what it lost is only its trailer; no cut gives a part of a picture."""
    format, options = FORMATS[name]
    data = encode(SMOOTH, format, **options)
    whole = decode(data)
    reasons = []
    for cut in {*range(1, len(data), max(1, len(data) // 150)), *range(len(data) - 40, len(data))}:
        try:
            part = decode(data[:cut])
        except DataError as e:
            reasons.append(str(e))
        else:
            assert cut >= len(data) - 30
            assert np.array_equal(part, whole), cut
    assert all("truncated or damaged" in reason or "cut short in its header" in reason for reason in reasons)
    capfd.readouterr()  # libtiff complains on standard error


def test_truncated_jpeg_names_its_reason() -> None:
    data = encode(SMOOTH, "JPEG")
    with pytest.raises(DataError, match=r"^truncated or damaged JPEG image$"):
        decode(data[:-50])


def test_truncated_is_refused_where_another_module_asked_for_leniency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(SMOOTH, "JPEG")[:-50]
    assert np.asarray(Image.open(io.BytesIO(data))).shape == SMOOTH.shape  # Pillow itself would fill it up
    with pytest.raises(DataError, match=r"^truncated or damaged JPEG image$"):
        decode(data)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_empty_file() -> None:
    with pytest.raises(DataError, match=r"^empty file$"):
        decode(b"")


@pytest.mark.parametrize(
    "data", [b"\0", b"hello, I am a text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xff\xd8\xff"]
)
def test_a_file_that_is_no_image(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^not an image \(JPEG, PNG, .*\), or cut short in its header$"):
        decode(data)


def test_damaged_bytes_never_raise_anything_else(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.Generator(np.random.Philox(key=3))
    outcomes = {"refused": 0, "decoded": 0}
    for format, options in FORMATS.values():
        data = np.frombuffer(encode(SMOOTH, format, **options), dtype=np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(0, min(len(data), 200), 4)] = rng.integers(0, 256, 4)
            try:
                decode(damaged.tobytes())
                outcomes["decoded"] += 1
            except DataError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 50
    capfd.readouterr()


def test_grayscale_is_repeated() -> None:
    gray = picture(2)[:, :, 0]
    assert np.array_equal(decode(encode(gray)), np.stack([gray] * 3, axis=2))


def test_low_bit_depths_fill_the_range() -> None:
    assert decode(png(4, 1, 2, 0, bytes([0b00011011])))[0, :, 0].tolist() == [0, 85, 170, 255]
    assert decode(png(2, 1, 1, 0, bytes([0b01000000])))[0, :, 0].tolist() == [0, 255]


def test_cmyk() -> None:
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:] = (0, 128, 255, 51)  # no cyan, half magenta, full yellow, a fifth black
    out = decode(encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=100))
    expected = [255 * (1 - c / 255) * (1 - 51 / 255) for c in (0, 128, 255)]
    assert out.shape == (16, 16, 3)
    assert np.abs(out.astype(float) - expected).max() <= 3


def test_16_bit_grayscale_keeps_the_high_byte() -> None:
    values = [0, 1, 255, 256, 257, 4095, 32767, 32768, 65279, 65280, 65535, 1000]
    data = png(4, 3, 16, 0, struct.pack(">12H", *values))
    assert decode(data)[:, :, 1].ravel().tolist() == [v // 256 for v in values]


def test_16_bit_colour_keeps_the_high_byte() -> None:
    values = [0, 300, 65535, 40000, 511, 512]
    assert decode(png(2, 1, 16, 2, struct.pack(">6H", *values))).ravel().tolist() == [v // 256 for v in values]


def test_16_bit_grayscale_in_other_formats() -> None:
    gray = np.array([[0, 256, 65535], [1000, 30000, 511]], dtype=np.uint16)
    pgm = b"P5 3 2 65535\n" + gray.astype(">u2").tobytes()
    tiff = encode(Image.fromarray(gray), "TIFF")
    for data in (pgm, tiff):
        assert np.array_equal(decode(data)[:, :, 2], gray // 256)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixel_types_without_a_known_range_are_refused(dtype: type) -> None:
    data = encode(Image.fromarray(np.ones((2, 3), dtype)), "TIFF")
    with pytest.raises(DataError, match=r"^pixel type '[IF]' is not supported: its range is unknown$"):
        decode(data)


def test_palette() -> None:
    colours = [(10, 20, 30), (200, 0, 50), (0, 255, 1)]
    data = png(3, 1, 8, 3, bytes([2, 0, 1]), (b"PLTE", bytes(v for c in colours for v in c)))
    assert [tuple(p) for p in decode(data)[0].tolist()] == [colours[2], colours[0], colours[1]]


def test_palette_with_a_transparent_entry_over_white() -> None:
    chunks = (b"PLTE", bytes([10, 20, 30, 200, 0, 50])), (b"tRNS", bytes([0, 255]))
    assert decode(png(2, 1, 8, 3, bytes([0, 1]), *chunks))[0].tolist() == [[255, 255, 255], [200, 0, 50]]


def test_alpha_over_white() -> None:
    rgba = np.concatenate([picture(4, 3, 2), np.array([[0, 255], [128, 1], [77, 254]], np.uint8)[:, :, None]], axis=2)
    share = rgba[:, :, 3:].astype(float) / 255
    expected = np.floor(rgba[:, :, :3] * share + 255 * (1 - share) + 0.5)
    assert np.array_equal(decode(encode(rgba)), expected)
    assert np.array_equal(decode(encode(rgba, "WEBP", lossless=True, exact=True)), expected)


def test_gray_with_alpha_over_white() -> None:
    assert decode(png(2, 1, 8, 4, bytes([40, 0, 40, 255])))[0].tolist() == [[255] * 3, [40] * 3]


def test_one_pixel() -> None:
    rgb = np.array([[[1, 2, 3]]], np.uint8)
    assert np.array_equal(decode(encode(rgb)), rgb)
    for resize in ("crop", "stretch"):
        assert np.array_equal(view(rgb, 8, resize), np.broadcast_to(rgb, (8, 8, 3)))


@pytest.mark.parametrize(("width", "height"), [(MAX_PIXELS // 10_000 + 1, 10_000), (60_000, 60_000), (2**31 - 1, 1)])
def test_very_large_images_are_refused_before_decoding(
    width: int, height: int, recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(DataError, match=r"^too large: .*at most 100,000,000 pixels are decoded$"):
        decode(png(width, height, 8, 2, None))
    assert not recwarn.list


def test_the_largest_image_allowed_is_tried() -> None:
    with pytest.raises(DataError, match=r"^truncated or damaged PNG image$"):
        decode(png(10_000, MAX_PIXELS // 10_000, 8, 2, None))


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(data), np.asarray(frames[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(5, 4, 9), format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert expected.shape == ((4, 9, 3) if orientation < 5 else (9, 4, 3))
    assert np.array_equal(decode(data), expected)


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encode(SMOOTH, "JPEG", exif=b"Exif\0\0not a TIFF header")
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_decoded_pixels_are_a_copy_that_may_be_written() -> None:
    for data in (encode(picture(6)), encode(picture(6)[:, :, 0]), encode(picture(6), "TIFF")):
        assert decode(data).flags.writeable


def test_pixel_hash_is_blake2b_of_shape_and_pixels() -> None:
    rgb = picture(7, 2, 3)
    expected = hashlib.blake2b(struct.pack("<qq", 2, 3) + rgb.tobytes(), digest_size=16).hexdigest()
    assert pixel_hash(rgb) == expected


def test_pixel_hash_finds_duplicates_across_formats_and_layouts() -> None:
    rgb = picture(8, 6, 4)
    versions = [encode(rgb), encode(rgb, compress_level=0), encode(rgb, "BMP"), encode(rgb, "WEBP", lossless=True)]
    assert len(set(versions)) == 4
    assert {pixel_hash(decode(data)) for data in versions} == {pixel_hash(rgb)}
    assert pixel_hash(np.asfortranarray(rgb)) == pixel_hash(rgb)
    assert pixel_hash(rgb.reshape(4, 6, 3)) != pixel_hash(rgb)
    changed = rgb.copy()
    changed[5, 3, 2] ^= 1
    assert pixel_hash(changed) != pixel_hash(rgb)


@pytest.mark.parametrize(("height", "width", "input_px"), [(64, 64, 24), (40, 64, 32), (64, 30, 96), (50, 51, 17)])
def test_view_stretch_against_torch(height: int, width: int, input_px: int) -> None:
    rgb = picture(9, height, width)
    planes = torch.from_numpy(rgb).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(planes, (input_px, input_px), mode="bilinear", antialias=True)[0]
    difference = view(rgb, input_px, "stretch").astype(float) - expected.permute(1, 2, 0).numpy()
    assert np.abs(difference).max() <= 1.5


@pytest.mark.parametrize(("height", "width"), [(20, 44), (44, 20)])
def test_view_crop_is_the_centre_of_the_scaled_picture(height: int, width: int) -> None:
    rgb = picture(10, height, width)
    scaled = Image.fromarray(rgb).resize((width // 2, height // 2), Image.Resampling.BILINEAR)
    left, top = (scaled.width - 10) // 2, (scaled.height - 10) // 2
    assert np.array_equal(view(rgb, 10, "crop"), np.asarray(scaled)[top : top + 10, left : left + 10])


def test_view_of_an_odd_margin_stays_centred() -> None:
    rgb = np.tile(np.arange(0, 90, 10, dtype=np.uint8)[None, :, None], (4, 1, 3))  # 4 × 9: margin 2.5 on either side
    assert np.abs(view(rgb, 4, "crop")[:, :, 0] - np.array([25, 35, 45, 55])).max() <= 1


def test_view_of_the_same_size_is_the_picture() -> None:
    rgb = picture(11, 12, 12)
    for resize in ("crop", "stretch"):
        out = view(rgb, 12, resize)
        assert np.array_equal(out, rgb)
        assert not np.shares_memory(out, rgb)


def test_view_of_a_long_strip_costs_its_crop() -> None:
    strip = np.broadcast_to(np.uint8(9), (1, 100_000, 3))
    assert np.array_equal(view(strip, 32, "crop"), np.full((32, 32, 3), 9))
