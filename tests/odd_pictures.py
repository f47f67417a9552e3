"""Pictures that Pillow does not write, written byte by byte."""

import io
import struct
import zlib

import numpy as np

SAMPLE_FORMAT = {"u": 1, "i": 2, "f": 3, "b": 1}


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(*pages, photometric=None, separate=False, tags=(), copies=False):
    """An uncompressed TIFF of arrays [H, W] or [H, W, C].

    `separate` stores channel after channel; `tags` are (tag, value) of one short number each; `copies` says of the
    pages behind the first that they are smaller copies of it.
    """
    content, links = bytearray(b"II*\0\0\0\0\0"), [4]
    for page, array in enumerate(pages):
        array = array if array.ndim == 3 else array[..., None]
        height, width, channels = array.shape
        places = []
        for plane in np.moveaxis(array, 2, 0) if separate else [array]:
            places.append((len(content), plane.nbytes))
            content += plane.astype(array.dtype.newbyteorder("<")).tobytes()
        wanted = 2 if channels >= 3 else 1
        entries = {256: width, 257: height, 258: [8 * array.itemsize] * channels, 259: 1, 277: channels}
        entries |= {262: wanted if photometric is None else photometric, 278: height, 284: 2 if separate else 1}
        entries |= {273: [place for place, _ in places], 279: [size for _, size in places], **dict(tags)}
        entries |= {339: [SAMPLE_FORMAT[array.dtype.kind]] * channels}
        if copies and page:
            entries[254] = 1
        if channels > 3:
            entries[338] = [0] * (channels - 3)
        fields = []
        for tag, value in sorted(entries.items()):
            values = value if isinstance(value, list) else [value]
            form, code = (4, "I") if tag in (273, 279) else (3, "H")
            data = struct.pack(f"<{len(values)}{code}", *values)
            if len(data) > 4:
                place = len(content)
                content += data + b"\0" * (len(data) % 2)
                data = struct.pack("<I", place)
            fields.append(struct.pack("<HHI", tag, form, len(values)) + data.ljust(4, b"\0"))
        content[links[-1] : links[-1] + 4] = struct.pack("<I", len(content))
        content += struct.pack("<H", len(fields)) + b"".join(fields) + bytes(4)
        links.append(len(content) - 4)
    return bytes(content)


def png(array, depth=None):
    """A PNG of an array [H, W], [H, W, 2..4], of 8 or 16 bits, or of gray with fewer bits, which `depth` says."""
    array = array if array.ndim == 3 else array[..., None]
    height, width, channels = array.shape
    depth = depth or 8 * array.itemsize
    if depth < 8:
        bits = np.unpackbits(array.astype(np.uint8)[..., 0][..., None], axis=2)[..., 8 - depth :].reshape(height, -1)
        rows = [np.packbits(row).tobytes() for row in bits]
    else:
        rows = [row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array]
    header = struct.pack(">IIBBBBB", width, height, depth, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def bmp(array, palette):
    """A BMP of 8 bits a pixel, with a palette of (R, G, B)."""
    colors = b"".join(bytes([b, g, r, 0]) for r, g, b in palette)
    data = b"".join(row.astype(np.uint8).tobytes().ljust(-(-len(row) // 4) * 4, b"\0") for row in array[::-1])
    start, (height, width) = 54 + len(colors), array.shape
    header = struct.pack("<IHHI", start + len(data), 0, 0, start)
    header += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 0, len(data), 0, 0, len(palette), 0)
    return b"BM" + header + colors + data
