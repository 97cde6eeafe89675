"""ScaleCom: top-k by a leader that rotates, similar memories."""
