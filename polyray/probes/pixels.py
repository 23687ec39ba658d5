"""Which question it answers: *what picture do these bytes hold, and what of it does the subject see?*

Place in the flow: the probe sets decode through here; mining hashes and views what they decoded. One decoder for
every source, so that an image gives the same pixels from a folder, a zip or a table.
"""

import hashlib
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from polyray.errors import DataError

Pixels = NDArray[np.uint8]
"""Decoded RGB, shape [height, width, 3]."""

MAX_PIXELS = 100_000_000
"""Largest image that is decoded, in pixels of its header: 300 MB as RGB."""

MAX_BYTES = 512 * 2**20
"""Largest encoded image that is read, so that a zip or a file that is no image cannot fill the memory."""

# Formats whose decoders are complete in themselves: Pillow would hand EPS to Ghostscript, and WMF to the system.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

# What Pillow's parsers raise on damaged headers and streams, beside its own UnidentifiedImageError (an OSError).
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error)

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> (transpose, flip rows, flip columns) that set the picture upright, in this order.
_UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def decode(data: bytes) -> Pixels:
    """Decodes an image to 8-bit RGB at its original size.

    Grayscale is repeated over the channels; palettes are resolved; CMYK and other colour spaces are converted as
    Pillow does, without colour profiles. Of 16 bits the high byte is kept (65,535 becomes 255, nothing is clipped).
    Transparency is laid over white. EXIF orientation is applied: the picture is upright, as a person sees it. Of an
    animation the first frame counts. A picture that is cut short is refused, never filled up with grey.

    Args:
        data: the encoded image (JPEG, PNG, GIF, BMP, WebP, TIFF or PPM).

    Returns:
        RGB of shape [height, width, 3], a copy of its own.

    Raises:
        DataError: the bytes are empty, no image, truncated or damaged, larger than `MAX_PIXELS`, or of a pixel type
            whose range is unknown (32-bit integer, floating point). The message is short and the same on every
            machine, fit for a table's `reason`.
    """
    if not data:
        raise DataError("empty file")
    with _strict():
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as e:
            raise DataError(f"too large: at most {MAX_PIXELS:,} pixels are decoded") from e
        except _DAMAGED as e:
            raise DataError(f"not an image ({', '.join(FORMATS)}), or cut short in its header") from e
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"too large: {width}×{height} px, at most {MAX_PIXELS:,} pixels are decoded")
        try:
            image.load()
            rgb = _to_rgb(image)
        except (*_DAMAGED, Image.DecompressionBombError) as e:
            raise DataError(f"truncated or damaged {image.format} image") from e
        if rgb is None:
            raise DataError(f"pixel type {image.mode!r} is not supported: its range is unknown")
        return _upright(rgb, _orientation(image))


@contextmanager
def _strict() -> Iterator[None]:
    """Pillow without leniency and without warnings.

    A subject's own module may have switched on the loading of truncated images for the whole process. The warnings are
    of large images, which are refused anyway, and of odd metadata, which do not matter.
    """
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _to_rgb(image: Image.Image) -> Pixels | None:
    """8-bit RGB of a loaded image; None where the pixel type has no known range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        gray = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        return None
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
    rgb, alpha = rgba[:, :, :3], rgba[:, :, 3:]
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is damaged (the pixels are not)."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGED:
        return 1
    return value if value in _UPRIGHT else 1


def _upright(rgb: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return rgb
    transpose, flip_rows, flip_columns = _UPRIGHT[orientation]
    if transpose:
        rgb = rgb.transpose(1, 0, 2)
    if flip_rows:
        rgb = rgb[::-1]
    if flip_columns:
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)


def pixel_hash(rgb: Pixels) -> str:
    """Identity of a picture by what it shows: equal for the same pixels in another file format.

    Args:
        rgb: RGB of shape [height, width, 3].

    Returns:
        32 hexadecimal digits: BLAKE2b-128 of height, width and the pixels in raster order.
    """
    height, width, _ = rgb.shape
    digest = hashlib.blake2b(struct.pack("<qq", height, width), digest_size=16)
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def view(rgb: Pixels, input_px: int, resize: Literal["crop", "stretch"]) -> Pixels:
    """What the subject sees of a picture, before its mean and deviation are applied.

    Antialiased bilinear resampling in Pillow's fixed-point arithmetic: the same on every machine. A crop equals the
    centre of the scaled picture, but only that centre is computed: a strip of 1 × 100,000 px costs no more than it.

    Args:
        rgb: RGB of shape [height, width, 3].
        input_px: side of the subject's input.
        resize: `crop` takes the largest centred square, `stretch` the whole picture at the wrong aspect ratio.

    Returns:
        RGB of shape [input_px, input_px, 3]; the input itself, copied, where it has that size already.
    """
    height, width, _ = rgb.shape
    box = (0.0, 0.0, float(width), float(height))
    if resize == "crop":
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    image = Image.fromarray(np.ascontiguousarray(rgb))
    return np.array(image.resize((input_px, input_px), Image.Resampling.BILINEAR, box=box))
