"""aime_fast: AIME, a variational world model for visual reinforcement learning, as a performance-tuned trainer."""

import signal
import sys

__version__ = "0.1.0"

# While `python -m aime_fast.train` imports itself, Ctrl-C ends it as SIGTERM does, not with a traceback; then `run_command` takes over.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
