"""Fitted Q over candidates: MoE-LM's card, its toy chain included."""

from dataclasses import replace

import numpy as np
import pytest

from experts.errors import ConfigError
from experts.types import ExpertSpec, Message, Request
from routers.base import RouterParts
from routers.fitted_q import Steps, fit_q, pick, targets
from routers.fitted_q import Value as Q
from routers.learned import artefact
from routers.learned.value import Value as Model
from routers.value import Value
from tests.routers.test_artefact import fitted
from tests.routers.test_learned import world

TURNS, MOODS = 5, 5
CANDIDATES = np.eye(2)  # A is paid now and costs mood, B lifts the mood
ALWAYS_A, ALWAYS_B, BEST = 5, 12, 13


def move(turn, mood, action):
    """(reward, next mood); the last turn pays 3 for each step of mood."""
    mood_after = max(0, mood - 1) if action == 0 else min(MOODS - 1, mood + 1)
    reward = 1.0 if action == 0 else 0.0
    return reward + (3 * mood_after if turn == TURNS - 1 else 0), mood_after


def context(turn, mood):
    return np.eye(TURNS * MOODS)[turn * MOODS + mood]


def chain(episodes, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(episodes):
        mood = 2
        for turn in range(TURNS):
            action = int(rng.integers(2))
            reward, after = move(turn, mood, action)
            last = turn == TURNS - 1
            rows.append((context(turn, mood), action, reward, context(min(turn + 1, TURNS - 1), after), not last))
            mood = after
    contexts, actions, rewards, nexts, going = map(np.array, zip(*rows, strict=True))
    size = len(rows)
    return Steps(
        context_NW=contexts,
        candidates_NCX=np.broadcast_to(CANDIDATES, (size, 2, 2)),
        offered_NC=np.ones((size, 2), bool),
        chosen_N=actions,
        reward_N=rewards,
        next_context_NW=nexts,
        next_candidates_NCX=np.broadcast_to(CANDIDATES, (size, 2, 2)),
        next_offered_NC=np.repeat(going[:, None], 2, axis=1),
    )


def play(choose):
    mood, total = 2, 0.0
    for turn in range(TURNS):
        reward, mood = move(turn, mood, choose(turn, mood))
        total += reward
    return total


def by_value(value):
    return lambda turn, mood: int(value.of(context(turn, mood)[None], CANDIDATES[None])[0].argmax())


def test_the_toy_pays_what_its_card_says():
    assert play(lambda *_: 0) == ALWAYS_A
    assert play(lambda *_: 1) == ALWAYS_B


def test_fitted_q_reaches_the_optimum_of_the_chain():
    steps = chain(2000)
    assert play(by_value(fit_q(steps, rounds=TURNS, strength=1e-3))) == BEST


def test_a_bandit_sees_only_the_next_reward():
    """Until the last turn, where the bonus is the next reward."""
    value = fit_q(chain(2000), rounds=1, strength=1e-3)
    assert [by_value(value)(turn, mood) for turn, mood in enumerate((2, 1, 2, 1, 2))] == [0, 0, 0, 0, 1]
    assert play(by_value(value)) < BEST


def test_the_backup_takes_the_best_of_what_is_offered_alone():
    """A candidate worth a hundred that nobody offered leaves the target as it was."""
    value = Q(weights_WX=np.array([[0.0, 0.0], [1.0, 0.0]]))  # worth: the candidate's own number
    offered = np.array([[True, True, False]])
    step = {
        "context_NW": np.zeros((1, 1)),
        "candidates_NCX": np.zeros((1, 3, 1)),
        "offered_NC": offered,
        "chosen_N": np.array([0]),
        "reward_N": np.array([0.5]),
        "next_context_NW": np.zeros((1, 1)),
    }
    for hidden in (0.0, 100.0):
        steps = Steps(**step, next_candidates_NCX=np.array([[[1.0], [2.0], [hidden]]]), next_offered_NC=offered)
        assert targets(steps, value, 0.9).tolist() == [0.5 + 0.9 * 2.0]
    last = Steps(**step, next_candidates_NCX=np.full((1, 3, 1), 100.0), next_offered_NC=np.zeros((1, 3), bool))
    assert targets(last, value, 0.9).tolist() == [0.5], "nothing follows the last step"


def test_values_belong_to_candidates_and_not_to_their_places():
    value = fit_q(chain(500), rounds=TURNS, strength=1e-3)
    one = value.of(context(0, 2)[None], CANDIDATES[None])[0]
    two = value.of(context(0, 2)[None], CANDIDATES[None, ::-1])[0]
    np.testing.assert_allclose(one, two[::-1])


def test_cql_lowers_what_was_offered_and_never_tried():
    """Logs of a policy that always takes A: nothing is known of B, and the penalty says so."""
    steps = chain(300)
    mine = steps.chosen_N == 0
    only = Steps(**{name: getattr(steps, name)[mine] for name in Steps.__dataclass_fields__})
    gap = []
    for weight in (0.0, 1.0):
        value = fit_q(only, rounds=1, strength=1e-2, conservative=weight)
        values = value.of(only.context_NW, only.candidates_NCX)
        gap.append((values[:, 0] - values[:, 1]).mean())
    assert gap[1] > gap[0] + 0.5


def test_cql_without_weight_is_ridge():
    steps = chain(200)
    plain = fit_q(steps, rounds=2, strength=1.0).weights_WX
    penalised = fit_q(steps, rounds=2, strength=1.0, conservative=1e-9).weights_WX
    np.testing.assert_allclose(plain, penalised, atol=0.05)


def test_dead_experts_are_not_picked_and_equal_candidates_count_once():
    rng = np.random.default_rng(0)
    values, same = np.array([9.0, 1.0, 1.0, 0.0]), np.array([[0.0], [1.0], [1.0], [2.0]])
    alive = np.array([False, True, True, True])
    assert pick(values, alive, same, epsilon=0.0, rng=rng) == (1, 1.0)
    picks = [pick(values, alive, same, epsilon=1.0, rng=rng) for _ in range(400)]
    assert {p for p, _ in picks} == {1, 3}
    assert {chance for _, chance in picks} == {0.5}
    with pytest.raises(ConfigError, match="every expert failed"):
        pick(values, np.zeros(4, bool), same, epsilon=0.0, rng=rng)


def test_logs_that_contradict_themselves_are_refused():
    steps = chain(1)
    parts = {name: getattr(steps, name) for name in Steps.__dataclass_fields__}
    with pytest.raises(ConfigError, match="Step 1 chose"):
        Steps(**{**parts, "offered_NC": np.zeros((5, 2), bool)})
    with pytest.raises(ConfigError, match="reward of step 2"):
        Steps(**{**parts, "reward_N": np.array([0, np.nan, 0, 0, 0])})


def test_experts_with_one_record_are_worth_the_same():
    _, training = world(300)
    twins = training.scores_QE[:, [0, 1, 2, 3, 0]]
    model = Model.fit(replace(training, scores_QE=twins, costs_E=np.ones(5)))
    predicted = model.predict(training.questions)
    np.testing.assert_allclose(predicted[:, 0], predicted[:, 4], atol=1e-4)


class Tiny:
    name, width = "tiny", 8

    async def encode(self, texts):
        return np.tile(np.eye(8, dtype=np.float32)[0], (len(texts), 1))


async def test_exploring_says_how_likely_it_was(tmp_path):
    artefact.save(fitted("value"), tmp_path)
    experts = {e: type("E", (), {"spec": ExpertSpec(expert_id=e, engine_id="x")})() for e in ("one", "two", "three")}
    parts = RouterParts(encoder=Tiny, experts=experts, artefact=tmp_path)
    pool = [e.spec for e in experts.values()]
    requests = [Request(messages=(Message(role="user", content="x"),))] * 300
    greedy = await Value(parts).route(requests, pool)
    (best,) = {d.expert_ids for d in greedy}
    tried = await Value(parts, epsilon=0.3, seed=1).route(requests, pool)
    share = np.mean([d.expert_ids != best for d in tried])
    assert 0.13 < share < 0.27
    for decision in tried:
        assert decision.top(3).expert_ids[0] == decision.expert_ids[0]
        assert f"probability {0.8 if decision.expert_ids == best else 0.1:.3f}" in decision.reason
    with pytest.raises(ConfigError, match="'epsilon'"):
        Value(parts, epsilon=2)
