"""Jobs of two ranks; each starts in several seconds, so a test module shares one job."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")
