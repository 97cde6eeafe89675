"""`python -m compression_plugins` is the command `compression-plugins`."""

import sys

from .cli import main

sys.exit(main())
