"""Aggregators that were fitted, over HTTP: the bad answers of test_combining_http.py, and a reward gone wrong."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.orchestrator.planted import RATES, fit_reward, fit_stack
from tests.orchestrator.served import Served, serving
from tests.orchestrator.test_combining_http import ENGINES, PANELS, ask, panel, text

COMBINERS = ("stack", "trained", "nan")


class Nan(BaseHTTPRequestHandler):
    """A scorer of which nothing but NaN comes."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"scores": [NaN, NaN, NaN, NaN, NaN]}')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def broken_reward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Nan) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        options = {"base_url": f"http://127.0.0.1:{server.server_port}", "api": "plain"}
        folder = tmp_path_factory.mktemp("nan")
        (folder / "reward.json").write_bytes(
            orjson.dumps({"version": 1, "kind": "http", "model": "nan", "options": options})
        )
        yield folder
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, broken_reward: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fitted")
    names = dict(zip(("a", "seven", "vague", "lone"), RATES, strict=True))
    combiners: dict[str, Any] = {
        "stack": {
            "name": "stack",
            "artefact": str(fit_stack(folder, RATES)),
            "options": {"names": names, "threshold": 1},
        },
        "trained": {"name": "best_of", "artefact": str(fit_reward(folder))},
        "nan": {"name": "best_of", "artefact": str(broken_reward)},
    }
    policies = {
        f"{name}.{combiner}": panel(*experts, aggregator=aggregator)
        for name, experts in PANELS.items()
        for combiner, aggregator in combiners.items()
        if name != "alone"
    }
    config = {
        "engines": {e: {"backend": "fake", "options": o} for e, o in ENGINES.items()},
        "experts": {e: {"engine": e.rstrip("23")} for e in [*ENGINES, "empty2", "empty3", "broken2"]},
        "policies": {"default": panel("a", "eight", "seven", aggregator="first"), **policies},
        "resilience": {"retries": 0, "breaker_failures": 1000},
        "encoder": {"model": "wordllama"},
    }
    with serving(config) as running:
        yield running


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("name", [name for name in PANELS if name != "alone"])
def test_whatever_the_experts_say_one_completion_comes(served: Served, name: str, combiner: str) -> None:
    if combiner == "stack" and name == "empty":
        return  # it knows none of them
    told = ask(served, f"collegium/{name}.{combiner}")
    assert isinstance(text(told), str)
    answered = [e for e in PANELS[name] if not e.startswith("broken")]
    assert sorted(a["expert_id"] for a in told["collegium"]["trace"]["answers"]) == sorted(answered)


def test_a_reward_that_gives_no_number_leaves_a_vote(served: Served) -> None:
    told = ask(served, "collegium/formats.nan")
    assert "the reward failed" in told["collegium"]["trace"]["note"]
    assert told["collegium"]["trace"]["winner"] == "8"


def test_a_trained_reward_says_what_each_answer_was_worth(served: Served) -> None:
    told = ask(served, "collegium/unparsable.trained")
    scores = {a["expert_id"]: a["score"] for a in told["collegium"]["trace"]["answers"]}
    assert scores["empty"] is None
    assert all(isinstance(scores[e], float) for e in ("vague", "nul"))


def test_a_stack_may_be_named_in_a_request(served: Served) -> None:
    told = ask(served, "collegium", top_k=3, aggregator="stack")
    assert told["collegium"]["aggregator"] == "stack"
    assert {a["expert_id"] for a in told["collegium"]["trace"]["answers"]} == {"a", "eight", "seven"}
    assert "the stack never saw eight" in told["collegium"]["trace"]["note"]
