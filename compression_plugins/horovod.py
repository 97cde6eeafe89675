"""Compression for a Horovod script that chooses its scheme itself; importing this installs the adapter.

import horovod.torch as hvd
from compression_plugins.horovod import Compression

optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=..., compression=Compression.scalecom(ratio=100))
"""

from .adapters.horovod.optimizer import Compression, finish, load, load_state_dict, save, state_dict

__all__ = ["Compression", "finish", "load", "load_state_dict", "save", "state_dict"]
