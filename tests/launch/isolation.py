"""Where jobs have network namespaces of their own, tests that count bytes may run beside others."""

from __future__ import annotations

import pytest

from launch import netlab

#: For `pytestmark`: without namespaces the bytes are those of this machine's loopback, which everybody shares.
COUNTS_BYTES = [pytest.mark.alone] if netlab.available() else []
