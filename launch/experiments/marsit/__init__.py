"""Marsit: one bit per value on a ring or torus."""
