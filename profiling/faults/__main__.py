"""`python -m profiling.faults`: see `campaign.py`."""

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the commands that are forked from here have it too
    from profiling.faults.campaign import main

    sys.exit(main())
