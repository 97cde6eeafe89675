"""Scripts of the Trainer, of Accelerate and of Lightning, unmodified, under `torchrun --compression`."""

from __future__ import annotations

import importlib.util
import re

import pytest

from .job import result, torchrun

CLIENTS = {
    "transformers": ("trainer.py", ["--steps", "6", "--accumulate", "2"]),
    "accelerate": ("accelerated.py", ["--steps", "6", "--accumulate", "2", "--clip", "1"]),
    "lightning": ("lit.py", ["--steps", "6", "--accumulate", "2"]),
}
FLAGS = ["--compression", "ef_signsgd", "--compression-set", "min_numel=0"]


NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("accelerate", "lightning")]


@pytest.mark.parametrize("client", ["transformers", *NIGHTLY])
def test_an_unmodified_client_trains_compressed(client):
    if importlib.util.find_spec(client) is None:
        pytest.skip(f"{client} is not installed")
    script, arguments = CLIENTS[client]
    output = torchrun(script, *arguments, flags=FLAGS)
    report = result(output)
    assert report["equal"] and report["steps"] == 6
    told = re.search(r"DDP: ef_signsgd, (\d+) steps on 2 ranks: .*, (\d+\.\d)x\)", output)
    assert told is not None, output[-4000:]
    assert int(told[1]) == 6  # an optimizer step each, although every second micro-batch is not synchronized
    assert float(told[2]) > 4
