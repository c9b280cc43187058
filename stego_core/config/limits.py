"""What an image may be before it is decoded."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from stego_core.config.base import Positive, PositiveFloat, Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits(Strict):
    """What an image may be before it is decoded; anything beyond becomes a quarantine row."""

    max_bytes: Positive = 256 * 2**20
    """Largest file, in bytes."""
    max_pixels: Positive = 100_000_000
    """Largest width times height, in pixels, as the header states it."""
    max_side: Positive = 30_000
    """Longest side, in pixels."""
    min_side: Positive = 8
    """Shortest side, in pixels."""
    max_seconds: PositiveFloat = 120.0
    """Longest time that decoding one image may take, or computing with it where that is watched."""

    def record(self) -> dict[str, int]:
        """Return what determines which images are used: not the time, which the machine decides."""
        return {name: value for name, value in asdict(self).items() if name != "max_seconds"}
