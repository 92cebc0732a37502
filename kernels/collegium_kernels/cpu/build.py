"""Compile moe.cpp at first use and keep the library in the user's cache, named by its source and compiler."""

import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from collegium_kernels.errors import BackendUnavailable

LOG = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
SOURCES = ("moe.cpp", "layer.h", "tiles.h", "tiles_avx512.h", "floats.h")
# No -march: the fast code is compiled for its own instructions and chosen when it runs.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-w")


def find_compiler() -> str | None:
    """The first C++ compiler on PATH."""
    return next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def cache_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("collegium", appauthor=False)) / "kernels"


def build(compiler: str, folder: Path, *, extra_flags: tuple[str, ...] = ()) -> Path:
    """The library of experts, compiled when it is not there yet. Raises BackendUnavailable, quoting the compiler."""
    return compile_library(compiler, tuple(FOLDER / name for name in SOURCES), folder, extra_flags=extra_flags)


def compile_library(
    compiler: str, sources: tuple[Path, ...], folder: Path, *, extra_flags: tuple[str, ...] = ()
) -> Path:
    """A shared library of the first source; the others are what it includes."""
    text = [source.read_text() for source in sources]
    identity = "\0".join((*text, compiler, platform.machine(), *FLAGS, *extra_flags))
    library = folder / f"{sources[0].stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        LOG.info("compiling %s", library)
        _compile([compiler, *FLAGS, *extra_flags, str(sources[0])], library)
    return library


def _compile(command: list[str], library: Path) -> None:
    """In a folder of its own, which is gone whatever happens, then renamed: two processes may do this at once."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=library.parent)
    except OSError as exc:
        raise BackendUnavailable(f"Cannot write to {library.parent}: {exc}; XDG_CACHE_HOME names another.") from exc
    with folder as name:
        made = Path(name) / library.name
        try:
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise BackendUnavailable(f"Could not run {' '.join(command)}: {exc}") from exc
        if done.returncode != 0:
            raise BackendUnavailable(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        made.replace(library)
