"""How a host framework meets the reducer: named seams of the host only, a contract test for each seam."""
