"""Which settings reach the accuracy of dense training where people train: Adam on a transformer."""
