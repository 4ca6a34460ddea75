"""How commands report errors that a user can mend."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from softgrpo.run.interrupt import Interrupted

# Not the kernels: what those refuse is a mistake of their caller, not of the user.
_PACKAGES = ("softgrpo", "softgrpo_engine", "softgrpo_vllm")


@contextmanager
def one_line_errors(command: str, interrupted: str = "interrupted") -> Iterator[None]:
    """Turns an error that was raised for the user into one line and exit status 2, signals into
    128 + number. Any other error is a mistake of the program and keeps its traceback.

    interrupted: what Ctrl-C prints. SOFTGRPO_DEBUG=1 shows where an expected error came from.
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
        if os.environ.get("SOFTGRPO_DEBUG") or not is_for_the_user(error):
            raise
        print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def is_for_the_user(error: Exception) -> bool:
    """Whether the message of an error says to the user what is wrong, and where.

    Three kinds do. An error class of ours (ConfigError, DataError, LostProcess ...). An OSError
    that names its file or is written in words, whoever raised it. A ValueError or
    FloatingPointError of a `raise` statement of the trainer or the engine; one that an expression
    there ran into (`int(x)`, `zip(strict=True)`, an operator of PyTorch) was not meant for anybody.
    """
    if isinstance(error, OSError):
        return error.filename is not None or error.errno is None
    if isinstance(error, ValueError | RuntimeError) and _is_ours(type(error).__module__):
        return True
    return isinstance(error, ValueError | FloatingPointError) and _was_raised_by_us(error)


def _was_raised_by_us(error: Exception) -> bool:
    """Whether the innermost frame is ours and stopped at a `raise`: C code has no frame, so that
    what PyTorch refuses ends in the frame that called it."""
    place = error.__traceback__
    if place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    code = place.tb_frame.f_code
    # Not __name__, which is "__main__" under `python -m softgrpo.cli.eval`.
    package = place.tb_frame.f_globals.get("__package__") or ""
    return _is_ours(package) and dis.opname[code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _PACKAGES
