"""`python -m compression_plugins.install_horovod`: builds Horovod with its torch support."""

import sys

from .adapters.horovod.build import main

if __name__ == "__main__":
    sys.exit(main())
