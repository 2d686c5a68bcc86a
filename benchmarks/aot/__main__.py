"""`python -m benchmarks.aot`."""

import os
import sys

os.environ.pop("TRITON_INTERPRET", None)  # a process either interprets or compiles, and triton asks when imported

from benchmarks.aot.command import main

sys.exit(main())
