import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from experts.errors import ConfigError
from experts.types import SamplingParams
from orchestrator.config import Config, load_config, nearest, parse_config
from orchestrator.config.reading import MAX_BYTES

SAMPLE = """
engines:
  smollm2: {backend: vllm, model: smollm2-135m-instruct, options: {max_model_len: 2048}}
  gpt:     {backend: openai, base_url: "http://127.0.0.1:9000/v1", model: some-model, api_key_env: OPENAI_API_KEY}
experts:
  generalist: {engine: smollm2, tags: [chat]}
  tutor:      {engine: smollm2, system_prompt: "...", tags: [math]}
policies:
  default: {router: {name: skills, artefact: ./artefacts/skills}, top_k: 1, aggregator: first}
  panel:   {router: {name: knn, artefact: ./artefacts/knn}, top_k: 3, aggregator: {name: weighted_vote}}
limits: {deadline_s: 120, max_concurrency: 256, queue: 1024, max_calls: 8}
residency: {slots: 2, max_wait_s: 5, min_loaded_s: 10}
"""

BASE: dict[str, Any] = {
    "engines": {"e": {"backend": "fake"}},
    "experts": {"a": {"engine": "e"}},
    "policies": {"default": {}},
}


def mistakes(**sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config({**BASE, **sections})
    head, *lines = caught.value.message.splitlines()
    assert head == f"config has {len(lines)} mistake(s):"
    return [line.removeprefix("  ") for line in lines]


def vllm(**fields: Any) -> dict[str, Any]:
    return {"e": {"backend": "vllm", "model": "m", **fields}}


# What is right


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "collegium.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_sample_of_the_contract_is_a_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SAMPLE))
    assert config.policies["default"].router.artefact == Path("./artefacts/skills")
    assert config.policies["default"].aggregator.name == "first"
    assert (config.policies["panel"].aggregator.name, config.policies["panel"].top_k) == ("weighted_vote", 3)
    engine = config.engines["gpt"].spec("gpt")
    assert (engine.engine_id, engine.backend, engine.model) == ("gpt", "openai", "some-model")
    assert engine.options == {"base_url": "http://127.0.0.1:9000/v1", "api_key_env": "OPENAI_API_KEY"}
    assert config.engines["smollm2"].spec("smollm2").options == {"max_model_len": 2048, "adapters": {}}


def test_an_expert_becomes_its_spec() -> None:
    given = {
        "engine": "e",
        "adapter": "x",
        "system_prompt": "Be kind.",
        "demos": [{"question": "q", "answer": "a"}],
        "examples": ["how?"],
        "description": "kind",
        "defaults": {"temperature": 0, "stop": ["END"]},
        "context_length": 9,
        "usd_per_mtok_in": 1,
        "usd_per_mtok_out": 2,
        "tags": ["chat"],
    }
    spec = parse_config({**BASE, "experts": {"a": given}}).experts["a"].spec("a")
    assert (spec.expert_id, spec.engine_id, spec.adapter) == ("a", "e", "x")
    assert (spec.system_prompt, spec.demos, spec.examples) == ("Be kind.", (("q", "a"),), ("how?",))
    assert spec.defaults == SamplingParams(temperature=0.0, stop=("END",))
    assert (spec.context_length, spec.usd_per_mtok_in, spec.usd_per_mtok_out) == (9, 1.0, 2.0)
    assert (spec.tags, spec.description) == (("chat",), "kind")


def test_the_published_schema_is_json_schema_and_agrees_with_the_parser() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    assert validator.is_valid(yaml.safe_load(SAMPLE))
    assert validator.is_valid({**BASE, "policies": {"default": {"router": "always", "aggregator": "vote"}}})
    for wrong in ({"limts": {}}, {"engines": {"e": {"backend": "vlm"}}}, {"policies": {"default": {"top_k": 0}}}):
        assert not validator.is_valid({**BASE, **wrong})


def test_yaml_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    text = """
engines: {e: {backend: fake}}
experts:
  a: &a {engine: e, tags: [x]}
  b: &b {<<: *a, tags: [y]}
  c: {<<: *b, tags: [z]}
policies: {default: {}}
"""
    config = load_config(write(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert [config.experts[e].tags for e in "abc"] == [("x",), ("y",), ("z",)]


@pytest.mark.parametrize(
    "sections",
    [
        {"engines": {"e": {"backend": "openai", "model": "m", "base_url": "http://x", "api_key_env": "sk-a1-b2"}}},
        {"security": {"api_keys": {"ann": {"env": "sk-a1-b2"}}}},
        {"security": {"admin_key_env": "sk-a1-b2"}},
    ],
)
def test_a_key_in_the_place_of_its_variable_is_refused_and_not_repeated(sections: Any) -> None:
    (mistake,) = [m for m in mistakes(**sections) if not m.startswith("experts.")]
    assert "takes the name of an environment variable" in mistake
    assert "sk-a1" not in mistake


def test_a_mistake_in_a_file_names_its_line(tmp_path: Path) -> None:
    text = (
        SAMPLE.replace("tags: [math]}", "tgas: [math]}")
        .replace("model: some-model, ", "")
        .replace("slots: 2", "slots: 0")
    )
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert [line.split(": ")[:2] for line in caught.value.message.splitlines()[1:]] == [
        ["  line 4", "engines.gpt.model"],
        ["  line 7", "experts.tutor.tgas"],
        ["  line 12", "residency.slots"],
    ]
    with pytest.raises(ConfigError, match=r"line 7: experts\.tutor\.engine: no engine 'smol'"):
        load_config(write(tmp_path, SAMPLE.replace("tutor:      {engine: smollm2", "tutor:      {engine: smol")))


def test_aliases_that_repeat_themselves_end(tmp_path: Path) -> None:
    laughs = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    for text in (laughs, "engines: &e {a: *e}"):
        with pytest.raises(ConfigError):
            load_config(write(tmp_path, text))


# Unknown keys, at each level


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"limts": {}}, "limts: unknown key; did you mean 'limits'?"),
        (
            {"engines": {"e": {"backend": "fake", "optins": {}}}},
            "engines.e.optins: unknown key; did you mean 'options'?",
        ),
        (
            {"engines": {"openai": {"backend": "openai", "model": "m", "base_url": "http://x", "api_key": "k"}}},
            "engines.openai.api_key: unknown key; did you mean 'api_key_env'?",
        ),
        (
            {"engines": vllm(autoscaling={"min_replica": 1})},
            "engines.e.autoscaling.min_replica: unknown key; did you mean 'min_replicas'?",
        ),
        ({"experts": {"a": {"engine": "e", "tgas": []}}}, "experts.a.tgas: unknown key; did you mean 'tags'?"),
        (
            {"experts": {"vllm": {"engine": "e", "defaults": {"temprature": 1}}}},
            "experts.vllm.defaults.temprature: unknown key; did you mean 'temperature'?",
        ),
        (
            {"experts": {"a": {"engine": "e", "demos": [{"question": "q", "answer": "a", "answr": "a"}]}}},
            "experts.a.demos.0.answr: unknown key; did you mean 'answer'?",
        ),
        ({"policies": {"default": {"topk": 2}}}, "policies.default.topk: unknown key; did you mean 'top_k'?"),
        (
            {"policies": {"default": {"router": {"name": "x", "artifact": "y"}}}},
            "policies.default.router.artifact: unknown key; did you mean 'artefact'?",
        ),
        (
            {"policies": {"default": {"aggregator": {"name": "x", "option": {}}}}},
            "policies.default.aggregator.option: unknown key; did you mean 'options'?",
        ),
        ({"limits": {"deadline": 3}}, "limits.deadline: unknown key; did you mean 'deadline_s'?"),
        ({"residency": {"slot": 3}}, "residency.slot: unknown key; did you mean 'slots'?"),
        ({"resilience": {"retry": 3}}, "resilience.retry: unknown key; did you mean 'retries'?"),
        (
            {"security": {"api_keys": {"t": {"env": "X", "model": []}}}},
            "security.api_keys.t.model: unknown key; did you mean 'models'?",
        ),
        ({"telemetry": {"zzz": 1}}, "telemetry.zzz: unknown key; known: log_level, otlp_endpoint."),
    ],
)
def test_an_unknown_key_names_the_nearest(sections: dict[str, Any], says: str) -> None:
    assert mistakes(**sections) == [says]


# Values


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"engines": {"e": {"backend": "vlm"}}}, "engines.e.backend: no backend 'vlm'; did you mean 'vllm'?"),
        ({"engines": {"e": {"backend": 5}}}, "engines.e.backend: no backend '5'; known: vllm, serve, openai, "),
        ({"engines": {"e": {"model": "m"}}}, "engines.e: needs a backend: one of vllm, serve, openai, recorded, fake."),
        ({"engines": {"e": {"backend": "vllm"}}}, "engines.e.model: is missing."),
        ({"engines": {}}, "engines: Dictionary should have at least 1 item"),
        ({"engines": {"e": "fake"}}, "engines.e: "),
        ({"engines": {"a b": {"backend": "fake"}}}, "engines.a b: no name; it takes 1 to 64 letters"),
        ({"engines": None}, "engines: must be a mapping."),
        ({"experts": {"a": 5}}, "experts.a: must be a mapping with the keys adapter, context_length, "),
        (
            {"policies": {"default": {"router": 5}}},
            "policies.default.router: must be a mapping with the keys artefact, ",
        ),
        ({"limits": {"deadline_s": float("nan")}}, "limits.deadline_s: Input should be a finite number, not nan."),
        ({"limits": {"deadline_s": float("inf")}}, "limits.deadline_s: Input should be a finite number, not inf."),
        ({"limits": {"queue": -1}}, "limits.queue: Input should be greater than or equal to 0, not -1."),
        ({"limits": {"max_calls": None}}, "limits.max_calls: Input should be a valid integer, not None."),
        ({"resilience": {"retries": 11}}, "resilience.retries: Input should be less than or equal to 10, not 11."),
        ({"experts": {"a": {"engine": "e", "defaults": {"top_p": 0}}}}, "experts.a.defaults.top_p: "),
        ({"telemetry": {"log_level": "loud"}}, "telemetry.log_level: Input should be 'debug', 'info', "),
    ],
)
def test_a_wrong_value_is_named_with_its_place(sections: dict[str, Any], says: str) -> None:
    (line,) = mistakes(**sections)
    assert line.startswith(says)


def test_all_mistakes_are_told_at_once() -> None:
    assert len(mistakes(limts={}, experts={"a": {"engin": "e"}}, limits={"queue": -1})) == 4


@pytest.mark.parametrize("data", [[], "text", 5, True])
def test_a_config_is_a_mapping(data: object) -> None:
    with pytest.raises(ConfigError, match="the file: must be a mapping with the keys batches, decisions, "):
        parse_config(data)


def test_an_empty_config_says_where_to_get_one() -> None:
    with pytest.raises(ConfigError, match=r"is empty\. 'collegium init'"):
        parse_config(None)
    with pytest.raises(ConfigError, match=r"3 mistake\(s\)"):
        parse_config({})


# What does not go together


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"policies": {"other": {}}}, "policies: one must be called 'default'; it answers for the model 'collegium'."),
        (
            {"engines": {"engine1": {"backend": "fake"}}, "experts": {"a": {"engine": "engin1"}}},
            "experts.a.engine: no engine 'engin1'; did you mean 'engine1'?",
        ),
        ({"experts": {"collegium": {"engine": "e"}}}, "experts.collegium: is the service's own name; take another."),
        (
            {"engines": vllm(adapters={"maths": "./x"}), "experts": {"a": {"engine": "e", "adapter": "math"}}},
            "experts.a.adapter: engine 'e' has no adapter 'math'; did you mean 'maths'?",
        ),
        (
            {"engines": vllm(), "experts": {"a": {"engine": "e", "adapter": "math"}}},
            "experts.a.adapter: engine 'e' has no adapter 'math'; known: none.",
        ),
        ({"engines": vllm(options={"model": "x"})}, "engines.e.options.model: stands beside 'options', not in it."),
        (
            {"engines": vllm(autoscaling={"min_replicas": 3})},
            "engines.e.autoscaling: min_replicas is above max_replicas.",
        ),
        (
            {"policies": {"default": {"max_calls": 9}}},
            "policies.default.max_calls: 9 is above limits.max_calls, 8.",
        ),
        (
            {"policies": {"default": {"top_k": 3, "max_calls": 2}}},
            "policies.default.top_k: 3 experts need as many max_calls, not 2.",
        ),
        (
            {"policies": {"default": {"quorum": 3, "late_s": 1, "top_k": 2}}},
            "policies.default.quorum: 3 answers cannot come of 2 experts (top_k).",
        ),
        (
            {"policies": {"default": {"quorum": 1}}},
            "policies.default: quorum and late_s go together: how many answers are enough, and after how long.",
        ),
        (
            {"security": {"api_keys": {"t": {"env": "X", "models": ["collegium/defalt"]}}}},
            "security.api_keys.t.models: no model 'collegium/defalt'; did you mean 'collegium/default'?",
        ),
    ],
)
def test_a_contradiction_is_named(sections: dict[str, Any], says: str) -> None:
    assert mistakes(**sections) == [says]


def test_what_goes_together_is_accepted() -> None:
    parse_config(
        {
            **BASE,
            "engines": {**vllm(adapters={"math": "./x"}, autoscaling={"min_replicas": 0}), "r": {"backend": "fake"}},
            "experts": {"a": {"engine": "e", "adapter": "math"}, "b": {"engine": "r", "adapter": "anything"}},
            "policies": {"default": {"top_k": 8}, "few": {"top_k": 2, "max_calls": 2}},
            "security": {"api_keys": {"t": {"env": "X", "models": ["collegium", "collegium/few", "a"]}}},
        }
    )


# The file


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read .*: No such file.*'collegium init'"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_a_date_is_a_text(tmp_path: Path) -> None:
    text = "{engines: {e: {backend: fake}}, experts: {x: {engine: e, examples: [2024-02-29]}}, policies: {default: {}}}"
    assert load_config(write(tmp_path, text)).experts["x"].examples == ("2024-02-29",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("engines: {e: {backend: fake}\nexperts: x", 'in "collegium.yaml", line 2, column 1'),
        ("engines:\n\t- x", "line 2, column 1"),
        ("a: 1\nb: [1, {c: 2, c: 3}]", "the key 'c' stands twice in one mapping\n.*line 2, column 15"),
        ("experts: {}\nengines: {}\nexperts: {}", "the key 'experts' stands twice in one mapping\n.*line 3, column 1"),
        ("a: *nothing", "undefined alias"),
        ("a: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("--- a\n--- b", "expected a single document"),
        (b"a: \xff", "invalid start byte"),
        ("{}: {a: 1, a: 2}", "'a' stands twice"),
        ("? [1]\n: 2", "unhashable key"),
    ],
)
def test_what_is_not_yaml_is_named_with_its_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"(?s)^{path} is not YAML: .*{says}"):
        load_config(path)


def test_an_empty_file_and_a_list_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        load_config(write(tmp_path, "# nothing\n"))
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(write(tmp_path, "- a\n- b\n"))


def test_a_mistake_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLE.replace("top_k: 1", "topk: 1"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.message == (
        f"{path} has 1 mistake(s):\n  line 9: policies.default.topk: unknown key; did you mean 'top_k'?"
    )


def test_a_file_too_large_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"larger than {MAX_BYTES} bytes"):
        load_config(write(tmp_path, "#" * (MAX_BYTES + 1)))
    with pytest.raises(ConfigError, match="larger than"):
        load_config(Path("/dev/zero"))


def test_nesting_past_all_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config(write(tmp_path, "[" * 1000))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLE)
    path.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_config(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["engines", "experts", "policies", "e", "backend", "fake"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_whatever_stands_in_the_file_is_a_config_or_explained(data: object) -> None:
    with suppress(ConfigError):
        assert parse_config(data).policies["default"]


def test_nearest_names_one_or_lists_all() -> None:
    assert nearest("limts", ["limits", "experts"]) == "; did you mean 'limits'?"
    assert nearest("zzz", ["limits", "experts"]) == "; known: limits, experts."
