"""Compile moe.cpp at first use and keep the library in the user's cache, named by its source and compiler."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from collegium_kernels.errors import BackendUnavailable

LOG = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
SOURCES = ("moe.cpp", "tiles.h", "tiles_avx512.h")
# No -march: the fast code is compiled for its own instructions and chosen when it runs.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-w")


def find_compiler() -> str | None:
    """The first C++ compiler on PATH."""
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def cache_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("collegium", appauthor=False)) / "kernels"


def build(compiler: str, folder: Path, *, extra_flags: tuple[str, ...] = ()) -> Path:
    """The library's path; compiles when it is not there yet. Raises BackendUnavailable with the compiler's words."""
    text = [(FOLDER / name).read_text() for name in SOURCES]
    identity = "\0".join((*text, compiler, platform.machine(), *FLAGS, *extra_flags))
    library = folder / f"moe-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        LOG.info("compiling %s", library)
        _compile(compiler, library, extra_flags)
    return library


def _compile(compiler: str, library: Path, extra_flags: tuple[str, ...]) -> None:
    """Into a file of its own, then renamed: two processes may do this at once."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(suffix=".so", dir=library.parent)
        os.close(handle)
        command = [compiler, *FLAGS, *extra_flags, str(FOLDER / SOURCES[0]), "-o", made]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise BackendUnavailable(f"Could not compile {SOURCES[0]} with {compiler}: {exc}") from exc
    if done.returncode != 0:
        Path(made).unlink()
        raise BackendUnavailable(f"{compiler} could not compile {SOURCES[0]}: {done.stderr[-2000:]}")
    Path(made).replace(library)
