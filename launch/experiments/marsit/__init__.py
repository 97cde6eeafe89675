"""Marsit: one bit a value on a ring or torus."""
