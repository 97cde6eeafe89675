"""torch, imported at its first use: a launcher validates configurations on machines, and in moments, without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        """Stands for the module; keeps what was asked for, so that only the first use of a name comes here."""

        def __getattr__(self, name: str) -> Any:
            import torch

            value = getattr(torch, name)
            self.__dict__[name] = value
            return value

    torch = _Torch()
