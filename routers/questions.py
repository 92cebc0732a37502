"""What a router may know of a question before any expert is asked.

Legend: Q questions, W width of the embedding, T tasks, F features of form, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Self

import numpy as np

from experts.errors import ConfigError
from routers.encoders import Encoder
from routers.records import Array

_BATCH = 128
_FORM_SCALE = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """``tasks`` are labels that came with the questions; None where one came without. ``texts`` are the questions as
    written; empty where only their embeddings are known."""

    vectors_QW: Array
    tasks: tuple[str | None, ...]
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tasks)

    def take(self, rows: Array) -> Self:
        return type(self)(
            vectors_QW=self.vectors_QW[rows],
            tasks=tuple(self.tasks[int(r)] for r in rows),
            texts=tuple(self.texts[int(r)] for r in rows) if self.texts else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The tasks seen while fitting, and how likely each is for a question that does not say: a ridge on embeddings."""

    names: tuple[str, ...]
    guess_DT: Array

    @classmethod
    def fit(cls, questions: Questions) -> Self:
        names = tuple(sorted({t for t in questions.tasks if t is not None}))
        told = np.array([t is not None for t in questions.tasks])
        one_hot = _one_hot(names, questions.tasks)[told]
        inputs = _with_one(questions.vectors_QW[told])
        gram = inputs.T @ inputs + np.eye(inputs.shape[1], dtype=np.float32)
        return cls(names=names, guess_DT=np.linalg.solve(gram, inputs.T @ one_hot).astype(np.float32))

    def of(self, questions: Questions) -> Array:
        """Q x T, rows sum to 1: certain where the task is told and known, else the likeliest."""
        if not self.names:
            return np.zeros((len(questions), 0), np.float32)
        told = _one_hot(self.names, questions.tasks)
        silent = told.sum(axis=1) == 0
        if silent.any():
            best = (_with_one(questions.vectors_QW[silent]) @ self.guess_DT).argmax(axis=1)
            told[np.flatnonzero(silent), best] = 1
        return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How long a question is and how many digits it has, in logs: all that tells hard from easy where there is one task
    only. Both arrays are empty where it is not read."""

    mean_F: Array
    spread_F: Array

    @classmethod
    def fit(cls, questions: Questions, *, is_read: bool) -> Self:
        if not is_read or not questions.texts:
            return cls(mean_F=np.zeros(0, np.float32), spread_F=np.ones(0, np.float32))
        forms = _forms(questions.texts)
        return cls(mean_F=forms.mean(axis=0), spread_F=np.maximum(forms.std(axis=0), 1e-6))

    def of(self, questions: Questions) -> Array:
        """Q x F, centred; 0 for questions whose texts are not known."""
        if not len(self.mean_F) or not questions.texts:
            return np.zeros((len(questions), len(self.mean_F)), np.float32)
        centred: Array = (_forms(questions.texts) - self.mean_F) / self.spread_F
        return centred


def _forms(texts: Sequence[str]) -> Array:
    # Without white space: who lays a question out differently does not make it harder.
    counts = [(len("".join(text.split())), sum(c.isdigit() for c in text)) for text in texts]
    return np.log1p(np.array(counts, np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The features of linear models: the embedding scaled to unit variance in sum, the task, and with ``reads_form``
    the form where the questions have one task at most. The form's scale leaves it all but unpenalised."""

    labels: Labels
    form: Form
    mean_D: Array
    vector_scale: float
    label_scale: float

    @classmethod
    def fit(
        cls,
        questions: Questions,
        *,
        vector_scale: float = 5.0,
        label_scale: float = 2.0,
        reads_form: bool = False,
    ) -> Self:
        labels = Labels.fit(questions)
        bare = cls(
            labels=labels,
            form=Form.fit(questions, is_read=reads_form and len(labels.names) < 2),
            mean_D=np.zeros(1, np.float32),
            vector_scale=vector_scale,
            label_scale=label_scale,
        )
        return replace(bare, mean_D=bare.features(questions).mean(axis=0))

    def features(self, questions: Questions) -> Array:
        parts = (
            questions.vectors_QW * self.vector_scale,
            self.labels.of(questions) * self.label_scale,
            self.form.of(questions) * _FORM_SCALE,
        )
        return np.concatenate(parts, axis=1, dtype=np.float32) - self.mean_D


async def embed(
    encoder: Encoder, texts: Sequence[str], folder: Path, *, on_batch: Callable[[int], None] = lambda _: None
) -> Array:
    """Embeddings of ``texts``, kept in ``folder`` under a name made of their content and the encoder's."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    path = folder / f"{content_key(encoder, texts)}.safetensors"
    if path.is_file():
        try:
            on_batch(len(texts))
            vectors: Array = load_file(path)["vectors"]
            return vectors
        except (SafetensorError, KeyError) as exc:
            raise ConfigError(f"The cached embeddings in {path} are broken ({exc}); delete the file.") from exc
    rows = []
    for start in range(0, len(texts), _BATCH):
        rows.append(await encoder.encode(texts[start : start + _BATCH]))
        on_batch(len(rows[-1]))
    vectors = np.concatenate(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file({"vectors": vectors}, unfinished)
    unfinished.replace(path)
    return vectors


def content_key(encoder: Encoder, texts: Sequence[str]) -> str:
    digest = blake2b(f"{encoder.name}\0{encoder.runtime}\0{encoder.width}".encode(), digest_size=20)
    for text in texts:
        raw = text.encode(errors="replace")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _one_hot(names: Sequence[str], tasks: Sequence[str | None]) -> Array:
    columns = {name: i for i, name in enumerate(names)}
    found = np.zeros((len(tasks), len(names)), np.float32)
    for row, task in enumerate(tasks):
        if task in columns:
            found[row, columns[task]] = 1
    return found


def _with_one(vectors_QW: Array) -> Array:
    return np.concatenate([vectors_QW, np.ones((len(vectors_QW), 1), np.float32)], axis=1)
