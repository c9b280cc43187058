"""What a WebP needs beyond Pillow: its size, before libwebp makes room for two canvases."""

from __future__ import annotations


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height as the header states them, pixels; None where it is cut or damaged.

    Opening a file allocates 8 bytes for each pixel of its canvas, however little of it is there.

    Source: WebP container specification (VP8X), RFC 6386 section 9.1 (VP8), the WebP lossless
    bitstream specification (VP8L).
    """
    if len(data) < 30:
        return None
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        sizes = int.from_bytes(body[6:8], "little"), int.from_bytes(body[8:10], "little")
        return sizes[0] & 0x3FFF, sizes[1] & 0x3FFF  # the upper two bits are a scale
    if kind == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None
