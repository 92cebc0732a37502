"""A model's code may do what it likes, to itself."""

import os
import socket

import pytest

from evals.generation import sandbox
from evals.generation.sandbox import passes
from experts.errors import ConfigError


async def test_what_runs_to_its_end_passes():
    assert await passes("assert sum(range(4)) == 6")
    assert not await passes("assert sum(range(4)) == 7")
    assert not await passes("this is no Python")
    assert await passes("")


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import sys; sys.stdout.close()",
        "print('a' * 10_000_000); raise ValueError",
    ],
)
async def test_an_end_that_is_no_end_does_not_pass(program):
    assert not await passes(program)


async def test_time_is_limited(monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_S", 1.0)
    assert not await passes("while True: pass")
    assert not await passes("import time; time.sleep(60)")


async def test_memory_and_files_are_limited(tmp_path):
    assert not await passes("x = bytearray(2**30)")
    assert not await passes("open('big', 'wb').write(b'a' * 2**22)")


async def test_memory_that_no_limit_counts_is_refused():
    take = "import ctypes; c = ctypes.CDLL(None); assert c.{} == -1"
    assert await passes(take.format("shmget(0, 2**29, 0o1600)"))
    assert await passes(take.format("unshare(0x10000000)"))


async def test_an_ordinary_users_walls_cannot_be_undone(monkeypatch, tmp_path):
    """Such a user owns the namespaces, and with them the mounts."""
    if os.getuid() == 0:  # becomes one; prctl() so that its own /proc belongs to it
        become = "os.setgroups([]); os.setgid(65534); os.setuid(65534); libc.prctl(4, 1)\n"
        monkeypatch.setattr(
            sandbox, "_JAIL", sandbox._JAIL.replace("uid, gid, folder =", become + "uid, gid, folder =")
        )
    undo = "import ctypes, os, struct; c = ctypes.CDLL(None, use_errno=True)\n"
    undo += "assert {} == -1 and ctypes.get_errno() == 1"
    assert await passes("import os; assert os.getuid() != 0; open('own', 'w')")
    assert await passes(undo.format("c.syscall(442, -100, b'/', 0, struct.pack('QQQQ', 0, 1, 0, 0), 32)"))
    assert await passes(undo.format("c.mount(b'none', os.getcwd().encode(), b'tmpfs', 0, b'size=4g')"))


async def test_no_process_outlives_it():
    assert not await passes("import os\nif os.fork() == 0:\n    import time; time.sleep(60)")


async def test_it_writes_to_its_own_folder_and_nowhere_else(tmp_path):
    tmp_path.chmod(0o777)
    assert await passes("open('own', 'w').write('a'); assert open('own').read() == 'a'")
    assert not await passes(f"open({str(tmp_path / 'left')!r}, 'w')")
    assert not await passes("for i in range(8): open(str(i), 'wb').write(b'a' * 2**20)")
    assert not list(tmp_path.iterdir())


async def test_it_signals_nobody():
    found = "import os\ntry: os.kill({}, 0)\nexcept ProcessLookupError: pass\nelse: raise ValueError"
    assert await passes(found.format(-1))
    assert await passes(found.format(os.getpid()))


async def test_nothing_runs_where_it_cannot_be_walled_in(monkeypatch, tmp_path):
    assert not await passes(f"import os; os._exit({sandbox._NO_WALL})")
    monkeypatch.setattr(sandbox, "_JAIL", sandbox._JAIL.replace("0x68020000", "0x7fffffff"))
    with pytest.raises(ConfigError, match="namespaces"):
        await passes("")


async def test_there_is_no_network_and_no_environment(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hush")
    assert await passes("import os; assert 'SECRET_KEY' not in os.environ")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not await passes(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)")


@pytest.mark.skipif(os.getuid() != 0, reason="only root has rights to give up")
async def test_it_has_no_rights(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hush")
    secret.chmod(0o600)
    assert not await passes(f"open({str(secret)!r}).read()")
    assert await passes("import os; assert os.getuid() != 0")
    assert not await passes("import os; os.setuid(0)")
    assert not await passes("import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))")
