"""The aggregation bench on a made-up pool: what it reports, and that it reports the same twice."""

from pathlib import Path

import orjson
import pytest

from evals.aggregate.bench import bench
from experts.errors import ConfigError
from tests.orchestrator.planted import write_pool


def test_it_reports_the_stack_beside_what_it_has_to_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.models.cache_dir", lambda: tmp_path / "cache")
    write_pool(tmp_path / "pools" / "mmlu-pro", questions=150)
    (tmp_path / "subsets.json").write_bytes(orjson.dumps({"mmlu-pro": {"two": ["ace", "noise"]}}))
    for out in ("one", "other"):
        bench(pools=tmp_path / "pools", out=tmp_path / out, only=None, seed=0)
    first, second = ((tmp_path / out / "report.json").read_bytes() for out in ("one", "other"))
    assert first == second
    report = orjson.loads(first)["mmlu-pro-two"]
    assert report["experts"] == ["ace", "noise"]
    assert report["baselines"]["best single"]["expert"] == "ace"
    assert (report["n_train"], report["n_test"]) == (120, 30)
    for stack in report["stacks"].values():
        assert stack["order"][0] == "ace"
        assert stack["calls"]["1"]["mean_calls"] == 1
        assert stack["calls"]["1"]["score"] == report["baselines"]["best single"]["score"]
    assert "| best single | 1.00 |" in (tmp_path / "one" / "report.md").read_text()
    assert (tmp_path / "one" / "mmlu-pro-two.png").stat().st_size > 10_000


def test_a_folder_without_pools_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="COLLEGIUM_POOLS"):
        bench(pools=tmp_path, out=tmp_path / "out", only=None, seed=0)
