"""The settings of the export of masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stego_core.config.base import Strict
from stego_core.config.limits import ImageLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportJob(Strict):
    """Write masks as PNG files in the tree of their pictures, with classes named by you."""

    masks: str = "runs/default-masks"
    """Output of segment_bucket.py."""
    out: str = "runs/default-export"
    """Folder or URI: `labels/`, `overlays/`, `classes.txt`, `legend.json`, `index/`."""
    names: str | None = None
    """TOML file of names by cluster id, `3 = "road"`: clusters of one name become one class, those
    named "" are ignored (255). Without a name a cluster stays a class of its own."""
    size: Literal["image", "stored"] = "image"
    """Of the label files: that of the picture, by nearest pixel, or that of the stored mask."""
    overlays: bool = False
    """Write each picture tinted with its classes, too (reads the pictures again)."""
    overwrite: bool = False
    """Replace an export that other settings made."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    dry_run: bool = False
    """Print the plan and touch nothing."""
    debug: bool = False
    """Show tracebacks and Ray's own messages."""
