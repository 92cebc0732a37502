"""The validation lists of the Symbolic-MoE paper, where they are at hand: beside the folder of recorded pools."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

LISTS = Path(os.environ.get("COLLEGIUM_POOLS") or "absent").parent / "symbolic-moe-splits"
PUBLISHED = {"mmlu-pro-val": 350, "medmcqa-val": 504, "aime-old-val": 354}
"""The paper's counts. GPQA's lists may not be passed on."""


@pytest.mark.skipif(not LISTS.is_dir(), reason="COLLEGIUM_POOLS has no folder symbolic-moe-splits beside it")
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_validation_list_has_the_papers_size(name):
    rows = [json.loads(line) for line in gzip.decompress((LISTS / f"{name}.jsonl.gz").read_bytes()).splitlines()]
    # Up to four questions of a list could not be parted from their options and were left out.
    assert PUBLISHED[name] - 4 <= len(rows) <= PUBLISHED[name]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["question"] and row["answer"] for row in rows)
    if name == "mmlu-pro-val":
        by_task = Counter(row["task"] for row in rows)
        assert len(by_task) == 14
        assert set(by_task.values()) <= set(range(21, 26))
