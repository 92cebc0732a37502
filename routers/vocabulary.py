"""A vocabulary of skills out of recorded questions: the names of their tasks, and phrases that set the tasks apart."""

import numpy as np

from routers.questions import Questions

PHRASES = 120
_RAREST = 12
_COMMONEST = 0.15
_SKILLS = 16


def mine(questions: Questions, seed: int, *, phrases: int = PHRASES) -> list[list[str]]:
    """Keywords of each question: its task, and the mined phrases that it contains.

    Phrases are one or two words that many questions have and whose share differs most between tasks (chi-squared).
    Questions that have neither tasks nor texts are grouped by their embeddings into skills without a name.
    """
    own: list[list[str]] = [[t] if t is not None else [] for t in questions.tasks]
    if questions.texts and phrases:
        for words, found in zip(own, _phrases(questions, seed, phrases), strict=True):
            words += [p for p in found if p not in words]
    return own if any(own) else [[f"skill {g + 1}"] for g in _groups(questions, seed)]


def _phrases(questions: Questions, seed: int, count: int) -> list[list[str]]:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.feature_selection import chi2

    rarest = min(_RAREST, max(1, len(questions) // 10))
    words = CountVectorizer(
        stop_words="english",
        ngram_range=(1, 2),
        min_df=rarest,
        max_df=_COMMONEST if len(questions) >= 100 else 1.0,
        binary=True,
        token_pattern=r"(?u)\b[a-zA-Z][a-zA-Z-]{2,}\b",  # noqa: S106  # no secret, an expression
    )
    try:
        contained = words.fit_transform(questions.texts)
    except ValueError:  # no word is neither too rare nor too common
        return [[] for _ in questions.texts]
    labels = [t or "" for t in questions.tasks]
    groups = labels if len(set(labels)) > 1 else [str(g) for g in _groups(questions, seed)]
    power = np.nan_to_num(chi2(contained, groups)[0]) if len(set(groups)) > 1 else contained.sum(axis=0).A1
    chosen = np.sort(np.argsort(-power, kind="stable")[:count])
    names = words.get_feature_names_out()[chosen]
    return [[str(names[i]) for i in row.indices] for row in contained[:, chosen].tocsr()]


def _groups(questions: Questions, seed: int) -> list[int]:
    from sklearn.cluster import KMeans

    count = min(_SKILLS, max(1, len(questions) // 8))
    return [int(g) for g in KMeans(count, n_init=1, random_state=seed).fit(questions.vectors_QW).labels_]
