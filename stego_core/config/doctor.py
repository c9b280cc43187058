"""The settings of the doctor."""

from __future__ import annotations

from dataclasses import dataclass, field

from stego_core.config.backbone import BackboneConfig
from stego_core.config.base import Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorJob(Strict):
    """Check that jobs can run here, and say what to do where they can't."""

    input: str | None = None
    """Folder or URI of images that jobs will read: its first file is read."""
    out: str | None = None
    """Folder or URI that jobs will write to: a small file is written there, read and deleted."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    json: str | None = None
    """Write the findings to this file or URI, too, as JSON."""
    nodes: bool = True
    """Look at versions, clock, input and output from each node of the cluster, too."""
    dry_run: bool = False
    """List the checks and make none."""
    debug: bool = False
    """Show tracebacks and Ray's own messages."""
