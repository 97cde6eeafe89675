"""The version, for all who compare it without importing the public names."""

__version__ = "0.1.0"
