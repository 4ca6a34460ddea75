"""Runs a generated program in a process of its own: no network, bounded CPU, memory and time.

Linux on x86-64 and arm64. The process cannot open sockets, start processes or send signals (a
seccomp filter that it cannot take off), and its limits cannot be raised. It can still read and
write files with the rights of the user, so that untrusted models belong into a container as well.
This file is also the program of the child; it needs nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress

WALL_SECONDS, CPU_SECONDS = 15.0, 10
MEMORY_BYTES, FILE_BYTES = 2 * 2**30, 16 * 2**20

_CANNOT_START = 99  # exit status of a child that could not shut itself in

# By architecture: its AUDIT_ARCH, the numbers of clone and clone3, and of the calls refused:
# socket, io_uring_setup; setrlimit, prlimit64; ptrace, process_vm_writev; kill, tkill, tgkill,
# rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal; where they exist, fork and vfork.
_ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        56,
        435,
        (41, 425, 160, 302, 101, 311, 62, 200, 234, 129, 297, 424, 57, 58),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        435,
        (198, 425, 164, 261, 117, 271, 129, 130, 131, 138, 240, 424),
    ),
}
_CLONE_THREAD = 0x10000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


class SandboxError(RuntimeError):
    """Programs cannot be shut in here; one line that says where they can."""


def passes(program: str, wall_seconds: float = WALL_SECONDS) -> bool:
    """Whether the program runs to its end: no exception, no exit before it, within the limits.

    Raises SandboxError where the process cannot be shut in.
    """
    # The child says this word after the program's last line; exit(0) half way does not count.
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="softgrpo-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            task = json.dumps({"program": program, "word": word}).encode()
            said, _ = process.communicate(task, timeout=wall_seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == _CANNOT_START:
        raise SandboxError(
            "code cannot be shut in on this machine: code tasks need Linux with seccomp on x86-64 "
            "or arm64"
        )
    return said.decode(errors="replace").strip() == word


def _child() -> None:
    task = json.load(sys.stdin)
    out = os.dup(1)
    with open(os.devnull, "r+b") as null:
        for descriptor in (0, 1, 2):
            os.dup2(null.fileno(), descriptor)
    try:
        _shut_in()
    except (OSError, KeyError, ImportError):
        os._exit(_CANNOT_START)
    exec(compile(task["program"], "<program>", "exec"), {"__name__": "__main__"})
    os.write(out, task["word"].encode())
    os._exit(0)


def _shut_in() -> None:
    import resource

    for limit, value in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    code = _filter(*_ARCHITECTURES[platform.machine()])
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, and where they are
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


def _filter(architecture: int, clone: int, clone3: int, refused: tuple[int, ...]) -> bytes:
    """The filter in classic BPF; seccomp_data is (nr, arch, instruction pointer, arguments)."""

    def step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    refuse = step(_RETURN, _REFUSE | errno.EPERM)
    steps = [step(_LOAD, 4), step(_EQUAL, architecture, yes=1), step(_RETURN, _KILL)]
    steps += [step(_LOAD, 0)]
    if architecture == _ARCHITECTURES["x86_64"][0]:  # the x32 calls have numbers of their own
        steps += [step(_AT_LEAST, 0x40000000, no=1), refuse]
    for number in refused:
        steps += [step(_EQUAL, number, no=1), refuse]
    # The flags of clone3 lie in memory that a filter cannot read; without it libc takes clone.
    steps += [step(_EQUAL, clone3, no=1), step(_RETURN, _REFUSE | errno.ENOSYS)]
    # clone makes threads, and nothing else.
    steps += [step(_EQUAL, clone, no=3), step(_LOAD, 16)]
    steps += [step(_ANY_BIT, _CLONE_THREAD, yes=1), refuse, step(_RETURN, _ALLOW)]
    return b"".join(steps)


if __name__ == "__main__":
    _child()
