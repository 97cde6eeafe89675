"""One document - YAML, JSON or a dict - selects the scheme and everything about it: reading it, and what it means."""

from .config import ENVIRONMENT_VARIABLE, Config, Rule, Settings, from_environment, presets
from .document import parse_assignments, parse_yaml, read_document

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Config",
    "Rule",
    "Settings",
    "from_environment",
    "parse_assignments",
    "parse_yaml",
    "presets",
    "read_document",
]
