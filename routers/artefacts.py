"""Whatever is fitted, on disk: arrays as safetensors, everything else as JSON with a version.

Never pickle: loading runs no code of the file's.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import orjson

from experts.errors import ConfigError
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One sort of artefact: a folder with a ``head`` (JSON) and a ``body`` (safetensors), whose hash the head holds.
    For errors: ``thing`` is what it is, ``again`` the command that makes one."""

    thing: str
    head: str
    body: str
    version: int
    again: str

    def write(self, folder: Path, about: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Raises ConfigError where the folder cannot be written; what was there then is still there."""
        from safetensors import SafetensorError
        from safetensors.numpy import save

        try:
            body = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
            stamped = {
                "version": self.version,
                "fitted_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "sha256": sha256(body).hexdigest(),
                **about,
            }
            _replace(folder, {self.body: body, self.head: orjson.dumps(stamped, option=orjson.OPT_INDENT_2)})
        except (OSError, SafetensorError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise ConfigError(f"Cannot write the {self.thing} to {folder}: {reason}.") from exc

    def read_head(self, folder: Path) -> Mapping[str, Any]:
        """Raises ConfigError when it is missing, no JSON, or of another version."""
        path = folder / self.head
        try:
            about = orjson.loads(path.read_bytes())
        except OSError as exc:
            raise ConfigError(
                f"No {self.thing} in {folder} ({path.name}: {exc.strerror}); make it: {self.again}"
            ) from exc
        except orjson.JSONDecodeError as exc:
            raise ConfigError(f"{path} is not JSON: {exc}. Make it again: {self.again}") from exc
        if not isinstance(about, dict) or about.get("version") != self.version:
            found = about.get("version") if isinstance(about, dict) else None
            raise ConfigError(
                f"{path} is of version {found!r}, this collegium reads {self.version}; make it again: {self.again}"
            )
        return about

    @contextmanager
    def reading(self, folder: Path, about: Mapping[str, Any]) -> Iterator[dict[str, Array]]:
        """The arrays that belong to the head ``about``. What goes wrong while something is made of them is a
        ConfigError: a broken artefact."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            self._check_hash(folder / self.body, about.get("sha256"))
            yield load_file(folder / self.body)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError) as exc:
            raise ConfigError(f"The {self.thing} in {folder} is broken ({exc!r}); make it again: {self.again}") from exc

    def _check_hash(self, path: Path, due: str | None) -> None:
        if due is None:
            raise ValueError(f"{self.head} is from before it held the hash of {self.body}")
        with path.open("rb") as body:
            if file_digest(body, "sha256").hexdigest() != due:
                raise ValueError(f"{self.head} and {self.body} are not of one fit")


def _replace(folder: Path, contents: Mapping[str, bytes]) -> None:
    """All are written before one takes its place: a full disk leaves what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    drafts = {folder / f".{name}.{os.getpid()}": folder / name for name in contents}
    try:
        for draft, content in zip(drafts, contents.values(), strict=True):
            draft.write_bytes(content)
        for draft, path in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def flatten(value: Any, key: str, arrays: dict[str, Array]) -> Any:
    """``value`` as JSON: dataclasses, mappings and tuples of them, with each array put into ``arrays`` by a name that
    begins with ``key``."""
    if isinstance(value, np.ndarray):
        arrays[key] = value
        return {"array": key}
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: flatten(item, f"{key}.{name}".lstrip("."), arrays) for name, item in value.items()}
    if isinstance(value, tuple):
        return [flatten(item, f"{key}.{place}", arrays) for place, item in enumerate(value)]
    return value


def restore(hint: Any, plain: Any, arrays: Mapping[str, Array]) -> Any:
    """What flatten() was given; ``hint`` is its type. Raises KeyError for a field that is missing."""
    if isinstance(plain, dict) and plain.keys() == {"array"}:
        return arrays[plain["array"]]
    if get_origin(hint) in (Union, UnionType):
        (some,) = (each for each in get_args(hint) if each is not NoneType)
        return None if plain is None else restore(some, plain, arrays)
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: restore(hints[f.name], plain[f.name], arrays) for f in fields(hint)})
    if get_origin(hint) is tuple:
        return tuple(restore(get_args(hint)[0], item, arrays) for item in plain)
    if isinstance(plain, dict):
        if len(get_args(hint)) != 2:
            raise TypeError(f"{hint} is no mapping, but stands as one")
        return {name: restore(get_args(hint)[1], item, arrays) for name, item in plain.items()}
    return plain


def columns_of(recorded: Sequence[str], served: Sequence[str], names: Mapping[str, str]) -> dict[str, int]:
    """Each served expert's column among the recorded ones; ``names`` says which is which where ids differ.

    Raises ConfigError."""
    places = {expert_id: column for column, expert_id in enumerate(recorded)}
    if strangers := [e for e in names if e not in served]:
        raise ConfigError(f"'names' maps {strangers}, which are no experts here; known: {', '.join(served)}.")
    if unknown := [r for r in names.values() if r not in places]:
        raise ConfigError(f"'names' maps to {unknown}, which the artefact never saw; it knows: {', '.join(recorded)}.")
    columns = {e: places[names.get(e, e)] for e in served if names.get(e, e) in places}
    if not columns:
        raise ConfigError(
            f"The artefact knows none of the experts {', '.join(served)}; it was fitted on {', '.join(recorded)}. "
            "Map them in its options: names: {expert of the config: recorded expert}."
        )
    return columns
