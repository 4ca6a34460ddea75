"""How commands report errors that a user can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from softgrpo.interrupt import Interrupted


@contextmanager
def one_line_errors(command: str, interrupted: str = "interrupted") -> Iterator[None]:
    """Turns an expected error into one line and exit status 2, signals into 128 + number.

    interrupted: what Ctrl-C prints. Expected are the errors that our own checks raise: ValueError,
    FloatingPointError, RuntimeError and OSError. SOFTGRPO_DEBUG=1 shows where they came from.
    """
    try:
        yield
    except Interrupted as stop:
        print(f"\n{command}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        print(f"\n{command}: {interrupted}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError, RuntimeError, OSError) as error:
        if os.environ.get("SOFTGRPO_DEBUG"):
            raise
        print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
