import json

import pytest

from evals.routing.suite import cases, suite
from experts.errors import ConfigError


def test_a_pool_is_measured_whole_or_by_its_subsets(make_pool):
    pools = make_pool(questions=8, name="one").parent / "pools"
    pools.mkdir()
    for name in ("one", "two"):
        make_pool(questions=8, name=f"pools/{name}")
    (pools.parent / "subsets.json").write_text(json.dumps({"two": {"pair": ["law-expert", "cells-expert"]}}))
    assert cases(pools) == [
        ("one", pools / "one", None),
        ("two-pair", pools / "two", "law-expert,cells-expert"),
    ]


def test_a_folder_without_pools_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="COLLEGIUM_POOLS"):
        cases(tmp_path)


def test_the_suite_writes_a_report_for_each(make_pool, tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    pools = tmp_path / "pools"
    pools.mkdir()
    make_pool(questions=40, name="pools/one")
    suite(pools=pools, out=tmp_path / "out", router="task", encoder="wordllama")
    assert json.loads((tmp_path / "out" / "one" / "report.json").read_text())["pool"] == "pools/one"
