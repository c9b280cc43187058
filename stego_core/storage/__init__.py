"""Files, URIs, manifests and run directories: everything that is read or written as bytes."""
