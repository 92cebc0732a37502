"""Runs a model's Python away from everything: a process of its own with limits, no network, no rights, no files.

Not a wall against an attacker who knows the kernel: for answers of models one would run anyway.
"""

import asyncio
import os
import signal
import sys
import tempfile

CPU_S, WALL_S, MEMORY_BYTES, FILE_BYTES = 5, 10.0, 512 * 2**20, 2**20

# Imported before rights are given up: the interpreter may live where nobody else can read.
_MODULES = (
    "array bisect cmath collections copy datetime decimal enum fractions functools hashlib heapq itertools json math "
    "operator random re socket statistics string sys textwrap time typing unicodedata"
)

# Runs before the program, in its process. Each limit is set where the system allows it; no new rights can be had after.
_JAIL = f"""
import ctypes, os, resource, sys
program = sys.stdin.read()
import {", ".join(_MODULES.split())}
libc = ctypes.CDLL(None, use_errno=True)
libc.unshare(0x10000000 | 0x40000000) if os.getuid() else libc.unshare(0x40000000)  # user and network namespaces
for limit, value in (
    (resource.RLIMIT_CPU, {CPU_S}), (resource.RLIMIT_AS, {MEMORY_BYTES}), (resource.RLIMIT_FSIZE, {FILE_BYTES}),
    (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # neither processes nor threads
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
exec(compile(program, "answer.py", "exec"), {{"__name__": "__main__"}})
os._exit(0)
"""


async def passes(program: str) -> bool:
    """Whether ``program`` runs to its end without an error, within CPU_S, WALL_S and MEMORY_BYTES.

    A program that calls exit() on its way does not pass: its end is marked by a word it is not told.
    """
    token = os.urandom(16).hex()
    with tempfile.TemporaryDirectory(prefix="collegium-run-") as folder:
        os.chmod(folder, 0o755)  # noqa: S103 - empty, and the program runs as nobody
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _JAIL),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(WALL_S):
                told = await _run(process, f"{program}\nprint({token!r}, flush=True)\n")
        except TimeoutError:
            told = b""
        finally:
            _kill(process.pid)
            await process.wait()
    return told.rstrip().endswith(token.encode()) and process.returncode == 0


async def _run(process: asyncio.subprocess.Process, program: str) -> bytes:
    assert process.stdin is not None  # noqa: S101
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(program.encode(errors="replace"))
        await process.stdin.drain()
        process.stdin.close()
    except ConnectionError:
        return b""  # it ended before it had read its program
    tail = b""
    while piece := await process.stdout.read(65_536):
        tail = (tail + piece)[-256:]
    await process.wait()
    return tail


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
