"""Unmodified scripts: every DDP model that they build is compressed, if a launcher has exported a configuration.

The constructor is all of torch that is wrapped. Importing this module is cheap; the rest comes with the first model.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from ...engine import loss_scale
from ...engine.notice import announce

#: Environment variable: the host that the launcher's configuration is for.
HOST_VARIABLE = "COMPRESSION_PLUGINS_HOST"


def install() -> None:
    """Notice every `DistributedDataParallel` that is built from now on, subclasses included. Idempotent."""
    from torch.nn.parallel import distributed

    cls = distributed.DistributedDataParallel
    original = cls.__init__
    if hasattr(original, "_noticed"):
        return
    loss_scale.watch()

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _take(self)

    __init__._noticed = True  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[method-assign]


def _take(ddp: Any) -> None:
    """Compress a model that has just been built, as the environment says.

    Horovod's launchers export the same configuration: a job that has loaded Horovod's optimizer is compressed there,
    and a DDP model in it is left alone, unless the launcher says that it started torch DDP.

    Raises:
        CompressionError: the configuration does not fit the model, or DDP was built in a way that has no room for it.
    """
    from ...config.config import from_environment
    from . import hook

    config = from_environment()
    if config is None:
        return
    if os.environ.get(HOST_VARIABLE, "") != "ddp" and "horovod.torch.optimizer" in sys.modules:
        announce("DDP: this job compresses in Horovod; DDP models travel as they are")
        return
    hook.attach(ddp, config)
