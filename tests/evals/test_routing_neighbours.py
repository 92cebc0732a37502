"""What the cells of knn miss, counted."""

import numpy as np
import pytest

from evals.routing.neighbours import compare, recall
from evals.routing.setting import make_setting
from routers.records import read_records
from routers.static import WordLlama


def groups(count, *, spread, width=12):
    """Unit vectors around twelve directions."""
    rng = np.random.default_rng(0)
    vectors = np.eye(width)[rng.integers(0, width, count)] + rng.normal(0, spread, (count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_recall_is_whole_where_all_is_read_and_less_where_neighbours_lie_apart():
    assert set(recall(groups(3_000, spread=0.3), share=1.0).values()) == {1.0}
    together, apart = (recall(groups(3_000, spread=spread), share=0.1) for spread in (0.05, 2.0))
    assert together[50] > 0.99
    assert apart[50] < 0.9
    assert apart[200] < apart[50], "further neighbours lie in further cells"


async def test_cells_that_read_everything_change_nothing(make_pool, tmp_path):
    setting = await make_setting(
        read_records(make_pool(questions=240)), WordLlama(), tmp_path, train="train", test="test", seed=0
    )
    score, change, other = compare(setting, share=1.0)
    assert (change.value, other) == (0.0, 0.0)
    assert score == pytest.approx(0.9, abs=0.1)
