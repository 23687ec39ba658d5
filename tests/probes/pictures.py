"""Pictures and files for the tests of the probe sets."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(seed: int, height: int = 5, width: int = 7) -> NDArray[np.uint8]:
    """Random RGB, another for every seed."""
    return np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(pixels: NDArray[np.uint8] | Image.Image, format: str = "PNG", **options: object) -> bytes:
    """Bytes of a picture as Pillow writes them."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes | None, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by the letter of its specification; without `rows` it ends where the pixels begin."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    for name, data in extra:
        out += chunk(name, data)
    if rows is None:
        return out + chunk(b"IDAT", b"x")
    stride = len(rows) // height
    filtered = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))
    return out + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")
