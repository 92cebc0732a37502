import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experts.errors import ConfigError
from experts.types import ExpertSpec
from routers.base import RouterParts
from routers.learned import MODELS, artefact
from routers.learned.artefact import Fitted, model_class
from routers.learned.base import Training
from routers.learned.knn import Knn
from routers.learned.router import knn, linear
from routers.questions import Questions


def training(size=120, width=8):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(size, width)).astype(np.float32)
    return Training(
        questions=Questions(vectors_QW=vectors, tasks=tuple("ab"[i % 2] for i in range(size))),
        scores_QE=(rng.random((size, 3)) < 0.5).astype(np.float32),
        answers_QE=rng.integers(0, 4, (size, 3)).astype(np.int32),
        costs_E=np.array([1.0, 2.0, 3.0]),
    )


def fitted(name):
    return Fitted(
        name=name,
        model=model_class(name).fit(training()),
        expert_ids=("one", "two", "three"),
        pool="toy",
        pool_digest="0" * 64,
        encoder="tiny",
        width=8,
        questions=120,
        seed=0,
    )


class Tiny:
    name, width = "tiny", 8


def parts(folder, *served, encoder=Tiny):
    experts = {e: type("Expert", (), {"spec": ExpertSpec(expert_id=e, engine_id="x")})() for e in served}
    return RouterParts(encoder=encoder, experts=experts, artefact=folder)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_router_that_was_saved_predicts_as_before(name, tmp_path):
    before = fitted(name)
    artefact.save(before, tmp_path / "made" / "here")
    after = artefact.load(tmp_path / "made" / "here")
    asked = training().questions
    assert (before.model.predict(asked) == after.model.predict(asked)).all()
    assert (after.name, after.expert_ids, after.pool_digest) == (name, before.expert_ids, before.pool_digest)
    assert sorted(p.name for p in (tmp_path / "made" / "here").iterdir()) == ["model.safetensors", "router.json"]


def test_a_knn_with_cells_predicts_as_before(tmp_path):
    lessons = training(400)
    for folder, exact in (("cells", 100), ("whole", 1000)):
        model = Knn.fit_with(lessons, (10, 10.0, 0.3), exact=exact)
        artefact.save(replace(fitted("knn"), model=model), tmp_path / folder)
        after = artefact.load(tmp_path / folder).model
        assert (after.predict(lessons.questions) == model.predict(lessons.questions)).all()
        assert bool(len(after.cells.ends_C)) == (folder == "cells")


def test_a_router_must_be_fitted_first():
    with pytest.raises(ConfigError, match="collegium router fit linear"):
        linear(parts(None, "one"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.update(version=99), "version 99"),
        (lambda head: head["model"].clear(), "is broken"),
        (lambda head: head.update(name="nonsense"), "No learned router 'nonsense'"),
        (lambda head: head.pop("expert_ids"), "is broken"),
    ],
)
def test_an_artefact_of_another_kind_is_refused(change, message, tmp_path):
    artefact.save(fitted("knn"), tmp_path)
    head = json.loads((tmp_path / "router.json").read_text())
    change(head)
    (tmp_path / "router.json").write_text(json.dumps(head))
    with pytest.raises(ConfigError, match=message):
        artefact.load(tmp_path)


def test_files_that_are_missing_or_cut_are_named(tmp_path):
    with pytest.raises(ConfigError, match="No fitted router"):
        artefact.load(tmp_path)
    artefact.save(fitted("linear"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match="is broken"):
        artefact.load(tmp_path)
    (tmp_path / "router.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        artefact.load(tmp_path)


def test_a_head_and_a_body_of_two_fits_are_refused(tmp_path):
    artefact.save(fitted("linear"), tmp_path)
    old = (tmp_path / "model.safetensors").read_bytes()
    model = replace(fitted("linear").model, weights_DE=fitted("linear").model.weights_DE + 1)
    artefact.save(replace(fitted("linear"), model=model), tmp_path)
    artefact.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(old)
    with pytest.raises(ConfigError, match="not of one fit"):
        artefact.load(tmp_path)


@pytest.mark.parametrize("change", [lambda w: w[:, 1:], lambda w: w[1:], lambda w: w * np.nan])
def test_a_model_that_cannot_score_is_refused_when_it_is_loaded(change, tmp_path):
    before = fitted("linear")
    model = replace(before.model, weights_DE=change(before.model.weights_DE))
    artefact.save(replace(before, model=model), tmp_path)
    with pytest.raises(ConfigError, match="is broken"):
        artefact.load(tmp_path)


def test_a_full_disk_leaves_the_artefact_that_was_there(tmp_path, monkeypatch):
    artefact.save(fitted("linear"), tmp_path)
    write = Path.write_bytes

    def fail(path, content):
        if "router.json" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(ConfigError, match="No space left on device"):
        artefact.save(fitted("knn"), tmp_path)
    assert artefact.load(tmp_path).name == "linear"
    assert {path.name for path in tmp_path.iterdir()} == {"router.json", "model.safetensors"}


def test_what_cannot_be_written_or_is_of_another_type_is_said(tmp_path):
    (tmp_path / "blocked" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(ConfigError, match="Cannot write the fitted router"):
        artefact.save(fitted("knn"), tmp_path / "blocked")
    artefact.save(fitted("knn"), tmp_path)
    head = json.loads((tmp_path / "router.json").read_text())
    head["model"]["k"] = {"a": 1}
    (tmp_path / "router.json").write_text(json.dumps(head))
    with pytest.raises(ConfigError, match="is broken"):
        artefact.load(tmp_path)


def test_a_service_that_does_not_fit_the_artefact_is_told_why(tmp_path):
    artefact.save(fitted("linear"), tmp_path)
    with pytest.raises(ConfigError, match="holds a router 'linear', not 'knn'"):
        knn(parts(tmp_path, "one"))
    with pytest.raises(ConfigError, match=r"'tiny' \(8 wide\), the service's encoder is 'wide'"):
        linear(parts(tmp_path, "one", encoder=lambda: type("Wide", (), {"name": "wide", "width": 99})()))
    with pytest.raises(ConfigError, match="knows none of the experts mine"):
        linear(parts(tmp_path, "mine"))
    with pytest.raises(ConfigError, match=r"maps to \['four'\]"):
        linear(parts(tmp_path, "mine"), names={"mine": "four"})
    with pytest.raises(ConfigError, match=r"maps \['yours'\]"):
        linear(parts(tmp_path, "mine"), names={"yours": "one"})
