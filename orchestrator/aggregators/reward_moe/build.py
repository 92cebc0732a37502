"""From recorded pools and preferences to a fitted reward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from experts.errors import ConfigError
from orchestrator.aggregators.reward_moe.armorm_fit import GateSettings, fit_armorm, fit_rewards
from orchestrator.aggregators.reward_moe.artefact import Fitted, Source
from orchestrator.aggregators.reward_moe.corpus import Corpus, Step, make_corpus
from orchestrator.aggregators.reward_moe.dmoerm_fit import DMoERMSettings, fit_dmoerm
from orchestrator.aggregators.reward_moe.model import MODELS, Model
from orchestrator.aggregators.reward_moe.samples import (
    Sample,
    draw_panels,
    pool_samples,
    preference_samples,
    read_answers,
    read_preferences,
    read_questions,
)
from orchestrator.aggregators.reward_moe.single import fit_single
from routers.encoders import Encoder
from routers.records import read_records

SIZES = (2, 3, 4, 5, 6, 8)
"""Answers in a panel of the training data."""
ATTACKED = 0.5
"""The share of samples with an attack among the answers."""
SPLIT_SEED = 0
"""Preferences come without a split; theirs is drawn with this, whatever else is seeded."""

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who hears how far the work is: each step with its length, then its progress."""

    step: Step = lambda _label, _total: None
    advance: Advance = lambda _: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a reward is fitted on: samples, and where they came from."""

    samples: tuple[Sample, ...]
    sources: tuple[Source, ...]


def read_material(
    pools: Sequence[Path], preferences: Sequence[Path], *, seed: int, split: str = "train", watch: Watch = Watch()
) -> Material:
    """The ``split`` of each pool, a panel of answers a question; and of each *.jsonl.gz in the folders ``preferences``.

    Raises ConfigError.
    """
    samples: list[Sample] = []
    sources: list[Source] = []
    for folder in pools:
        records = read_records(folder)
        drawn = draw_panels(records, records.rows(split), sizes=SIZES, seed=seed)
        watch.step(f"reading {records.name}", len(records.expert_ids))
        answers = read_answers(folder, records, drawn, on_expert=watch.advance)
        own = pool_samples(records, read_questions(folder), answers, drawn, attacked=ATTACKED, seed=seed)
        samples += own
        sources.append(Source(name=records.name, digest=records.digest, answers=len(answers)))
    for path in [file for folder in preferences for file in preference_files(folder)]:
        name = path.name.removesuffix(".jsonl.gz")
        rows = read_preferences(path)
        own = preference_samples(rows, name, split, attacked=ATTACKED, seed=seed, split_seed=SPLIT_SEED)
        samples += own
        digest = blake2b(path.read_bytes(), digest_size=32).hexdigest()
        sources.append(Source(name=name, digest=digest, answers=2 * len(own)))
    if not any(sample.pairs for sample in samples):
        raise ConfigError("There is nothing to learn from: no two answers to a question differ in grade or preference.")
    return Material(samples=tuple(samples), sources=tuple(sources))


def preference_files(folder: Path) -> list[Path]:
    """Raises ConfigError for a folder without any."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl.gz"))
    if not files:
        raise ConfigError(f"{folder} has no *.jsonl.gz with preferences.")
    return files


def fit_model(kind: str, corpus: Corpus, *, seed: int, advance: Advance = lambda _: None) -> Model:
    fit: Mapping[str, Callable[[], Model]] = {
        "armorm": lambda: fit_armorm(corpus, seed=seed, on_advance=advance),
        "uniform": lambda: fit_rewards(corpus, seed=seed),
        "dmoerm": lambda: fit_dmoerm(corpus, seed=seed, on_advance=advance),
        "single": lambda: fit_single(corpus, seed=seed, on_advance=advance),
    }
    if kind not in fit:
        raise ConfigError(f"No reward '{kind}'; known: {', '.join(MODELS)}.")
    return fit[kind]()


async def build_reward(
    kind: str, material: Material, encoder: Encoder, cache: Path, *, seed: int, watch: Watch = Watch()
) -> Fitted:
    """Raises ConfigError."""
    if kind not in MODELS:
        raise ConfigError(f"No reward '{kind}'; known: {', '.join(MODELS)}.")
    corpus = await make_corpus(material.samples, encoder, cache, on_step=watch.step, on_advance=watch.advance)
    watch.step(f"fitting {kind}", _steps(kind, corpus))
    return Fitted(
        kind=kind,
        model=fit_model(kind, corpus, seed=seed, advance=watch.advance),
        scaling=corpus.scaling,
        encoder=encoder.name,
        width=encoder.width,
        sources=material.sources,
        pairs=len(corpus.pairs_K2),
        seed=seed,
    )


def _steps(kind: str, corpus: Corpus) -> int:
    """At most so many; early stops make them fewer."""
    inner = DMoERMSettings()
    one = inner.own.steps + inner.fusion.steps + inner.capability.steps * 5
    return {
        "armorm": GateSettings().schedule.steps,
        "uniform": 1,
        "single": 600,
        "dmoerm": inner.base.steps + one * len(set(corpus.categories)),
    }[kind]
