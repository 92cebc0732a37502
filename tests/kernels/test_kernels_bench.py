"""The bench's own arithmetic: what a fair run is, and what a target means."""

from pathlib import Path

import pytest
import torch
from collegium_kernels.ragged import rectangular

from evals.kernels.activations import errors
from evals.kernels.bench import OLMOE, least_s, routing_of, streaming_s, verdict
from evals.kernels.chart import line_chart
from evals.kernels.ggml import find_libraries
from evals.kernels.hosts import agreed, table
from evals.kernels.shape import Shape
from evals.kernels.timing import Roof, Times, drifted, interleave

ROOF = Roof(int8=1e12, bf16=5e11, fp32=2e11, read=4e10)


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    times = interleave(
        {"a": lambda turn: order.append(f"a{turn}"), "b": lambda turn: order.append(f"b{turn}")}, repeats=2
    )
    assert order == ["a0", "b0", "a0", "b0", "a1", "b1"]
    assert [len(t.runs_s) for t in times.values()] == [2, 2]


def test_a_roof_that_moved_refuses_the_run() -> None:
    assert drifted(ROOF, Roof(int8=1.04e12, bf16=5e11, fp32=2e11, read=4e10)) is None
    assert drifted(ROOF, Roof(int8=1e12, bf16=5e11, fp32=2e11, read=3e10)) == "read moved 25%"


def test_median_and_spread() -> None:
    times = Times(runs_s=(1.0, 2.0, 9.0))
    assert (times.min_s, times.median_s, times.mad_s) == (1.0, 2.0, 1.0)


def test_the_roof_is_the_longer_of_reading_and_computing() -> None:
    shape = Shape(name="", E=4, F=8, D=16, k=2)
    few, many = routing_of(1, shape), routing_of(100_000, shape)
    assert least_s(shape, few, "int8", ROOF) == pytest.approx(2 * 384 / 4e10)
    assert least_s(shape, many, "int4", ROOF) == pytest.approx(2 * 200_000 * 384 / 1e12)
    assert least_s(shape, many, "bf16", ROOF) == pytest.approx(2 * 200_000 * 384 / 5e11)
    slow_bf16 = Roof(int8=1e12, bf16=1e11, fp32=2e11, read=4e10)
    assert least_s(shape, many, "bf16", slow_bf16) == pytest.approx(2 * 200_000 * 384 / 2e11)


def test_reading_while_multiplying_bounds_experts_with_few_rows() -> None:
    rates = {8: 1e10, 16: 8e9}
    shape = Shape(name="", E=4, F=8, D=16, k=1)
    few = rectangular(torch.arange(4).repeat(8)[:, None], torch.ones(32, 1), num_experts=4)
    assert streaming_s(shape, few, "int8", rates.__getitem__) == pytest.approx(4 * 384 / 1e10)
    assert streaming_s(shape, few, "int4", rates.__getitem__) == pytest.approx(4 * 384 / 2 / 8e9)
    assert streaming_s(shape, few, "bf16", rates.__getitem__) == pytest.approx(4 * 384 * 2 / 8e9)
    many = rectangular(torch.arange(4).repeat(40)[:, None], torch.ones(160, 1), num_experts=4)
    assert streaming_s(shape, many, "int8", rates.__getitem__) == 0


@pytest.mark.parametrize("mean_k", [1.0, 4.47, 8.0])
def test_ragged_routings_have_the_mean_they_are_asked_for(mean_k: float) -> None:
    torch.manual_seed(0)
    routing = routing_of(4000, OLMOE, mean_k=mean_k)
    assert routing.num_pairs / 4000 == pytest.approx(mean_k, rel=0.02)
    assert routing.fixed_k is None


def test_skew_moves_the_load() -> None:
    loads = {s: torch.bincount(routing_of(500, OLMOE, skew=s).expert_ids_P, minlength=32) for s in ("uniform", "zipf")}
    assert loads["zipf"].max() > 2 * loads["uniform"].max() * 0.8
    assert int((torch.bincount(routing_of(500, OLMOE, skew="one-hot").expert_ids_P, minlength=32) > 0).sum()) == 8


def test_targets_are_met_or_not() -> None:
    fast, slow = Times(runs_s=(5.9e-3,)), Times(runs_s=(6.1e-3,))
    assert verdict("ours, int4 g128", "int4", 16, fast, 0.5) == ("6 or 58%", "yes")
    assert verdict("ours, int4 g128", "int4", 16, slow, 0.5) == ("6 or 58%", "no")
    assert verdict("ours, int4 g128", "int4", 16, slow, 0.6) == ("6 or 58%", "yes")
    assert verdict("ours, bf16", "bf16", 256, fast, 0.84) == ("85% of roof", "no")
    assert verdict("torch grouped_mm", "bf16", 256, fast, 0.1) == ("-", "-")


def test_a_chart_has_a_line_for_each_series() -> None:
    svg = line_chart("t", "x", "y", {"a & b": [(1, 2), (4, 8)], "c": [(1, 1), (4, 3)]}, log=True)
    assert svg.count('fill="none"') == 2
    assert "a &amp; b" in svg


def test_one_scale_a_row_costs_more_than_one_a_group_where_an_input_is_large() -> None:
    x = torch.randn(16, 256)
    x[:, 3] *= 50
    row, grouped, twice = errors((x, torch.randn(96, 256), torch.randn(96, 256), torch.randn(256, 96)), 8, 32)
    assert 0 < 2 * grouped < row < 0.2
    assert 0 < 50 * twice < grouped


def test_hosts_count_equal_texts_and_the_first_other_token() -> None:
    assert [agreed(row, [1, 2, 3]) for row in ([1, 2, 3], [1, 9, 3], [4, 2, 3])] == [3, 1, 0]
    dense = {"rows": [[1, 2], [3, 4]], "tokens_per_s": 2.0, "chosen": 4}
    other = {"rows": [[1, 2], [3, 5]], "tokens_per_s": 4.0, "chosen": 3}
    twin = {**dense, "rows": [[1, 9], [3, 5]]}
    lines = table({"dense": dense, "one": twin, "other": {**other, "twin": "one"}}, 2).splitlines()
    assert lines[-1] == "| other | 1 of 2 | 1.5 of 2 | 75.0% | 1 of 2 | 4.0 |"
    assert lines[2] == "| dense | 2 of 2 | 2.0 of 2 | 100.0% | - | 2.0 |"


def test_llama_cpp_takes_part_only_where_its_libraries_are(tmp_path: Path) -> None:
    assert find_libraries(tmp_path) is None
    (tmp_path / "libggml-cpu.so").touch()
    assert find_libraries(tmp_path) == tmp_path
