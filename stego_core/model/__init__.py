"""The frozen backbone, the head, the probes, and their files."""
