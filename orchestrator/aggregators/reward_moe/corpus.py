"""Samples as arrays.

Legend: N answers, P prompts, W width of the embedding, D features, O objectives, K pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.aggregators.reward_moe.features import own_part
from orchestrator.aggregators.reward_moe.inputs import Inputs, Scaling, raw_features
from orchestrator.aggregators.reward_moe.samples import Sample
from routers.encoders import Encoder
from routers.questions import embed
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """``labels_NO`` is NaN where nothing is known. ``pairs_K2`` holds rows, the winner's first. ``real_N`` is false for
    attacks."""

    inputs: Inputs
    scaling: Scaling
    objectives: tuple[str, ...]
    labels_NO: Array
    pairs_K2: Array
    categories: tuple[str, ...]
    sources: tuple[str, ...]
    real_N: Array

    @property
    def weights_K(self) -> Array:
        """How often each pair is to be learned from: a source's pairs count together as the root of their number, so
        that a small one is heard beside a large one."""
        _, codes_P = np.unique(self.sources, return_inverse=True)
        codes_K = codes_P[self.inputs.prompt_N[self.pairs_K2[:, 0]]]
        found: Array = 1 / np.sqrt(np.bincount(codes_K))[codes_K]
        return found


Step = Callable[[str, int], None]


async def make_corpus(
    samples: Sequence[Sample],
    encoder: Encoder,
    cache: Path,
    *,
    objectives: Sequence[str] | None = None,
    scaling: Scaling | None = None,
    on_step: Step = lambda _label, _total: None,
    on_advance: Callable[[int], None] = lambda _: None,
) -> Corpus:
    """``objectives`` and ``scaling`` come from the training corpus, which alone goes without. Embeddings are kept in
    ``cache``."""
    texts = [own_part(text) for sample in samples for text in sample.panel.texts]
    on_step("embedding answers", len(texts))
    answers_NW = await embed(encoder, texts, cache, on_batch=on_advance)
    on_step("embedding prompts", len(samples))
    prompts_PW = await embed(encoder, [s.panel.question for s in samples], cache, on_batch=on_advance)
    on_step("reading answers", len(samples))
    ends = np.cumsum([len(s.panel.texts) for s in samples])
    rows = []
    for sample, end in zip(samples, ends, strict=True):
        rows.append(raw_features(sample.panel, answers_NW[end - len(sample.panel.texts) : end]))
        on_advance(1)
    raw_NF, prompt_N = np.concatenate(rows), np.repeat(np.arange(len(samples)), [len(r) for r in rows])
    scaling = scaling or Scaling.fit(raw_NF)
    names = tuple(objectives) if objectives is not None else _objectives(samples)
    starts = ends - [len(s.panel.texts) for s in samples]
    pairs = [(start + w, start + l) for s, start in zip(samples, starts, strict=True) for w, l in s.pairs]  # noqa: E741
    return Corpus(
        inputs=scaling.inputs(raw_NF, answers_NW, prompts_PW, prompt_N),
        scaling=scaling,
        objectives=names,
        labels_NO=_labels(samples, names),
        pairs_K2=np.array(pairs, np.int64).reshape(-1, 2),
        categories=tuple(s.category for s in samples),
        sources=tuple(s.source for s in samples),
        real_N=np.array([not (s.attacked and i == len(s.labels) - 1) for s in samples for i in range(len(s.labels))]),
    )


def _objectives(samples: Sequence[Sample]) -> tuple[str, ...]:
    return tuple(sorted({name for sample in samples for labels in sample.labels for name in labels}))


def _labels(samples: Sequence[Sample], names: Sequence[str]) -> Array:
    rows = [[labels.get(name, np.nan) for name in names] for sample in samples for labels in sample.labels]
    return np.array(rows, np.float32).reshape(-1, len(names))
