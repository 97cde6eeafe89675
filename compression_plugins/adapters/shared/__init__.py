"""What several hosts' adapters have in common."""
