"""Distillation of the head: sampling, one step, the loop, checkpoints."""
