from typing import Any

import pytest

from experts.errors import BadRequest, NotFound
from experts.types import ExpertSpec, Request
from orchestrator.aggregators.first import First
from orchestrator.policies import Overrides, PolicyBook
from orchestrator.run import Policy
from routers.baseline import Direct


class NamedRouter(Direct):
    def __init__(self, name: str) -> None:
        super().__init__("a")
        self.name = name


class NamedAggregator(First):
    def __init__(self, name: str) -> None:
        self.name = name


ROUTERS = {name: NamedRouter(name) for name in ("always", "knn")}
AGGREGATORS = {name: NamedAggregator(name) for name in ("first", "vote")}
OWN = NamedRouter("always")


def book() -> PolicyBook:
    default = Policy(name="default", router=OWN, aggregator=AGGREGATORS["first"], max_calls=3)
    panel = Policy(
        name="panel", router=ROUTERS["knn"], aggregator=AGGREGATORS["vote"], top_k=3, max_calls=6, max_usd=0.5
    )
    return PolicyBook(
        policies={"default": default, "panel": panel},
        routers=ROUTERS,
        aggregators=AGGREGATORS,
        expert_ids=("a", "b"),
        max_calls=8,
    )


def resolve(model: str, **overrides: Any) -> Policy:
    return book().resolve(model, Overrides(**overrides))


def test_a_model_is_the_service_a_policy_or_an_expert() -> None:
    assert book().models == ["collegium", "collegium/default", "collegium/panel", "a", "b"]
    assert book().resolve("collegium").name == "default"
    assert book().resolve("collegium/panel").top_k == 3


async def test_an_expert_by_name_is_the_only_candidate() -> None:
    policy = book().resolve("b")
    pool = [ExpertSpec(expert_id=e, engine_id="e") for e in "ab"]
    (decision,) = await policy.router.route([Request(prompt="?")], pool)
    assert (policy.name, policy.max_calls, policy.aggregator.takes_one) == ("b", 1, True)
    assert list(decision.scores) == ["b"]


@pytest.mark.parametrize("model", ["", "default", "collegium/", "collegium/none", "c", "x" * 500])
def test_an_unknown_model_is_not_found(model: str) -> None:
    with pytest.raises(NotFound) as caught:
        resolve(model)
    assert caught.value.param == "model"
    assert len(caught.value.message) < 200


def test_no_override_leaves_the_policy_as_it_is() -> None:
    one = book()
    assert one.resolve("collegium", Overrides()) is one.resolve("collegium")


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    policy = resolve("collegium/panel", router="always", top_k=2)
    assert (policy.router, policy.top_k) == (ROUTERS["always"], 2)
    assert (policy.name, policy.aggregator, policy.max_calls, policy.max_usd) == ("panel", AGGREGATORS["vote"], 6, 0.5)
    assert resolve("collegium", aggregator="vote").aggregator is AGGREGATORS["vote"]


def test_a_policys_own_router_is_not_replaced_by_a_namesake() -> None:
    assert resolve("collegium", router="always").router is OWN
    assert resolve("collegium/panel", router="always").router is ROUTERS["always"]


@pytest.mark.parametrize(
    ("overrides", "says", "param"),
    [
        ({"router": "nkk"}, r"No router 'nkk' here; known: always, knn\.", "collegium.router"),
        ({"aggregator": "sum"}, r"No aggregator 'sum' here; known: first, vote\.", "collegium.aggregator"),
        ({"router": "x" * 500}, "x{100}'", "collegium.router"),
        ({"top_k": 0}, "top_k must be above 0, not 0", "collegium.top_k"),
        ({"max_calls": -1}, "above 0", "collegium.max_calls"),
        ({"max_usd": 0.0}, "above 0", "collegium.max_usd"),
        ({"max_usd": float("nan")}, "above 0", "collegium.max_usd"),
    ],
)
def test_an_override_that_cannot_be_is_a_bad_request(overrides: dict[str, Any], says: str, param: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        resolve("collegium", **overrides)
    assert caught.value.param == param


@pytest.mark.parametrize("overrides", [{"router": "knn"}, {"top_k": 2}])
def test_an_expert_by_name_is_not_routed(overrides: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="'a' is one expert"):
        resolve("a", **overrides)
    assert resolve("a", top_k=1, max_calls=4, max_usd=1.0).max_usd == 1.0


@pytest.mark.parametrize(("asked", "gets"), [(None, 6), (2, 2), (7, 7), (99, 8)])
def test_calls_are_bounded_by_the_services_limit(asked: int | None, gets: int) -> None:
    assert resolve("collegium/panel", max_calls=asked, top_k=1).max_calls == gets


@pytest.mark.parametrize(
    ("model", "asked", "gets"),
    [("panel", None, 0.5), ("panel", 0.1, 0.1), ("panel", 9.0, 0.5), ("default", 9.0, 9.0), ("default", None, None)],
)
def test_a_request_may_lower_a_budget_but_not_lift_it(model: str, asked: float | None, gets: float | None) -> None:
    assert resolve(f"collegium/{model}", max_usd=asked, top_k=1).max_usd == gets
