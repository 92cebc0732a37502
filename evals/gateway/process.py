"""A program under test: started on a core of its own, awake only while it is asked, and weighed through /proc."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class NotStarted(Exception):
    """It ended, or took too long, before it listened."""


class Process:
    """``command`` on ``core`` (None: anywhere), in a session of its own, writing to ``log``."""

    def __init__(
        self, command: Sequence[str], *, port: int, core: int | None, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.port = port
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        if core is not None:
            # Before the interpreter is up, so that every thread and child it makes inherits it.
            os.sched_setaffinity(self._process.pid, {core})

    def wait(self, within_s: float) -> None:
        """Returns when the port takes connections. Raises NotStarted with the end of the log."""
        give_up = time.monotonic() + within_s
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                raise NotStarted(f"it ended with status {self._process.returncode}: {self._last_words()}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise NotStarted(f"it did not listen within {within_s:g} s: {self._last_words()}")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Outside these blocks it is stopped, so that one program's idle work does not weigh on another."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def cpu_s(self) -> float:
        """User and system time of all its processes so far."""
        return sum((int(stat[11]) + int(stat[12])) * _TICKS_S for stat in self._stats())

    def rss_mib(self) -> float:
        return sum(int(stat[21]) * _PAGE_BYTES for stat in self._stats()) / 2**20

    def stop(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # it has ended

    def _stats(self) -> Iterator[list[str]]:
        """The fields of /proc/PID/stat after the name, for every process of the session."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            if int(stat[3]) == self._process.pid:
                yield stat

    def _last_words(self) -> str:
        return " / ".join(self._log.read_text(errors="replace").split("\n")[-6:]).strip()[-500:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
