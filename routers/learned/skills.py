"""Skills (Symbolic-MoE, arXiv 2503.05641) on a recorded pool, with no model to name the keywords.

The vocabulary is mined from the questions (vocabulary.py), a question's keywords are the nearest by embedding, and
experts are rated by their profiles (profiles.py, recruiting.py). The released code's choices are options; the defaults
are what won on the validation split of mmlu-pro.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from routers.keywords import Tagger
from routers.learned.base import Training
from routers.profiles import Profiles
from routers.questions import Questions
from routers.records import Array
from routers.recruiting import competence, relevance
from routers.vocabulary import mine


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How profiles become scores. ``most`` keywords a question, none further than ``floor``."""

    score: str = "shrunk"
    strength: float = 20.0
    competence: str = "none"
    temperature: float = 0.5
    most: int = 5
    floor: float = -1.0


RELEASED = Rule(score="signed", competence="power", temperature=0.5, most=3)
"""As the authors' code: sums of +1 and -1, powers of the global sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skills:
    profiles: Profiles
    tagger: Tagger
    rule: Rule

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, Rule())

    @classmethod
    def fit_with(cls, training: Training, rule: Rule) -> Self:
        keywords = mine(training.questions, training.seed)
        # Tagged as they will be when they are asked, so that a profile counts what its reader will see.
        tagger = Tagger.fit(training.questions, keywords)
        tags = tagger.tag(training.questions, most=rule.most, floor=rule.floor)
        return cls._of(training, [[tagger.names[k] for k in row.nonzero()[0]] for row in tags], tagger, rule)

    @classmethod
    def from_keywords(cls, training: Training, keywords_Q: Sequence[Sequence[str]], rule: Rule) -> Self:
        """With keywords from elsewhere, an LLM say."""
        return cls._of(training, keywords_Q, Tagger.fit(training.questions, keywords_Q), rule)

    @classmethod
    def _of(cls, training: Training, keywords_Q: Sequence[Sequence[str]], tagger: Tagger, rule: Rule) -> Self:
        ids = training.expert_ids or tuple(f"expert {e + 1}" for e in range(training.scores_QE.shape[1]))
        profiles = Profiles.build(keywords_Q, training.scores_QE, ids)
        # A keyword that no question was tagged with keeps its place and has nothing to say.
        missing = {name: 0 for name in tagger.names if name not in profiles.seen}
        profiles = replace(profiles, seen={n: profiles.seen.get(n, missing.get(n, 0)) for n in tagger.names})
        return cls(profiles=profiles, tagger=tagger, rule=rule)

    def predict(self, questions: Questions) -> Array:
        return self.rate(self.tagger.tag(questions, most=self.rule.most, floor=self.rule.floor))

    def rate(self, tags_QK: Array) -> Array:
        """Q x E shares that sum to 1. A keyword named twice counts twice; a question without keywords is given the
        experts' global competence."""
        local_KE, global_E = self.profiles.scored(self.rule.score, self.rule.strength)
        share = competence(global_E, self.rule.competence, self.rule.temperature)
        rated = relevance(tags_QK @ local_KE, share)
        rated[tags_QK.sum(axis=1) == 0] = share
        return rated
