"""The table of codecs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compression_plugins.schemes import registry

from .quick import run_quick


@pytest.mark.nightly
def test_every_scheme_is_measured_on_two_and_eight_ranks(tmp_path: Path) -> None:
    headline, records = run_quick("codecs", tmp_path)
    assert "of the bytes bound" in headline
    tables = [json.loads(record["rows"]) for record in records if record["part"] == "schemes"]
    assert [sorted(row["scheme"] for row in table) for table in tables] == [registry.names()] * 2
    kernels = [record for record in records if record["part"] == "kernel"]
    assert len(kernels) >= 3 and all(record["ms"] > 0 and record["bytes"] > 0 for record in kernels)
