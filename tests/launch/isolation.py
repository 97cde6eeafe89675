"""Where jobs have network namespaces of their own, tests that count bytes may run beside others."""

from __future__ import annotations

import pytest

from launch.lab import netlab

#: Without namespaces the bytes are those of this machine's loopback, which everybody shares.
counts_bytes = pytest.mark.alone if netlab.available() else pytest.mark.hosts
