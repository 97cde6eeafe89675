"""Patch: only the weights that an optimizer step has changed, without loss."""

from __future__ import annotations

from typing import ClassVar

from .base import Operation, Scheme


class Patch(Scheme):
    """Each owner of weights sends the places and the new values of those that are not what every rank holds.

    In fine-tuning with bf16 weights most steps are too small to change most of them. It is of weights only, which
    ranks hold alike before a step, so it stands under `parameters` and not in the registry, whose schemes average.
    """

    name: ClassVar[str] = "patch"
    paper: ClassVar[str] = "-"
    lossless: ClassVar[bool] = True

    @property
    def operations(self) -> frozenset[Operation]:
        return frozenset()
