"""Runs a model's Python away from everything: limits, no network, no rights, nobody to signal, and nothing to write to
but a small folder in memory.

Not a wall against an attacker who knows the kernel: for answers of models one would run anyway.
"""

import asyncio
import os
import signal
import sys
import tempfile

from experts.errors import ConfigError

CPU_S, WALL_S, MEMORY_BYTES, FILE_BYTES = 5, 10.0, 512 * 2**20, 2**20

# Imported before rights are given up: the interpreter may live where nobody else can read.
_MODULES = (
    "array bisect cmath collections copy datetime decimal enum fractions functools hashlib heapq itertools json math "
    "operator random re socket statistics string sys textwrap time typing unicodedata"
)

_NO_WALL = 77
"""The exit status of a jail that could not be closed; the program has not run then."""

# Runs before the program, in its process. It may read what others may, write to its own small folder, and send signals
# to nobody but itself: a first child is the init of a PID namespace, and the program the second. mount_setattr (442)
# makes everything else read-only in one step. No new rights can be had after: whoever made the namespaces could undo
# them, so capabilities go (capset), and a filter refuses unshare, and shmget, whose memory no limit counts.
_JAIL = f"""
import ctypes, os, resource, struct, sys
program = sys.stdin.read()
import {", ".join(_MODULES.split())}
libc = ctypes.CDLL(None, use_errno=True)
uid, gid, folder = os.getuid(), os.getgid(), os.getcwd()
def must(done):
    if done:
        os._exit({_NO_WALL})
def write(path, text):
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        must(1)
def follow():  # ends as the child does
    child = os.fork()
    if child:
        _, how = os.waitpid(child, 0)
        os._exit(1 if how else 0)
libc.prctl(1, 9)  # PR_SET_PDEATHSIG: nothing outlives the caller
must(libc.unshare(0x68020000 | (0x10000000 if uid else 0)))  # mounts, IPC, PIDs, network; users
if uid:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{{uid}} {{uid}} 1"), ("gid_map", f"{{gid}} {{gid}} 1")):
        write(f"/proc/self/{{name}}", text)
must(libc.syscall(442, -100, b"/", 0x8000, struct.pack("QQQQ", 1, 0, 1 << 18, 0), 32))
must(libc.mount(b"none", folder.encode(), b"tmpfs", 6, b"size=4m,nr_inodes=64,mode=777"))
os.chdir(folder)
follow()
follow()
for limit, value in (
    (resource.RLIMIT_CPU, {CPU_S}), (resource.RLIMIT_AS, {MEMORY_BYTES}), (resource.RLIMIT_FSIZE, {FILE_BYTES}),
    (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))
if uid == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
must(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # neither processes nor threads
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
known = {{"x86_64": (0xC000003E, 29, 272), "aarch64": (0xC00000B7, 194, 97)}}
must(os.uname().machine not in known)
arch, *refused = known[os.uname().machine]
load, equal, least, end, dead = 0x20, 0x15, 0x35, 0x06, 1 << 31
steps = [(load, 0, 0, 4), (equal, 1, 0, arch), (end, 0, 0, dead)]  # calls of another ABI have other numbers
steps += [(load, 0, 0, 0), (least, 0, 1, 1 << 30), (end, 0, 0, dead)]
for call in refused:
    steps += [(equal, 0, 1, call), (end, 0, 0, 0x50001)]  # EPERM
steps.append((end, 0, 0, 0x7FFF0000))  # anything else is allowed
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
must(libc.prctl(22, 2, struct.pack("HP", len(steps), ctypes.addressof(code)), 0, 0))  # PR_SET_SECCOMP
exec(compile(program, "answer.py", "exec"), {{"__name__": "__main__"}})
os._exit(0)
"""


async def passes(program: str) -> bool:
    """Whether ``program`` runs to its end without an error, within CPU_S, WALL_S and MEMORY_BYTES.

    A program that calls exit() on its way does not pass: its end is marked by a word. One that searches its own process
    for that word can forge its verdict, as one whose answers equal everything can. Raises ConfigError where the system
    gives no namespaces: nothing runs without its walls.
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
    if process.returncode == _NO_WALL and not told:
        raise ConfigError(
            "This system gives no namespaces, and a model's code is not run without them: run as root, or allow user "
            "namespaces (in a container: --privileged, or a seccomp profile that allows unshare and mount). It takes "
            "Linux on x86-64 or 64-bit ARM."
        )
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
