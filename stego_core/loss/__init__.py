"""The correspondence loss of STEGO as pure functions on tensors; no I/O and no state."""
