"""Data sets on disk: our directory layout, plain folders, and the demo photographs."""
