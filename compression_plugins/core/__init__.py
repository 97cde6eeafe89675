"""What everything above shares: a call of a scheme, the law of a memory, the clock and its random streams, seconds."""
