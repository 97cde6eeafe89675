"""Plain PyTorch, one function for each kernel: what the fast implementations are tested against."""
