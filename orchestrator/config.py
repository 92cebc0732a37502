"""``collegium.yaml``: what may stand in it, and how a mistake in it is explained.

pydantic models of the file; ``specs`` properties turn them into the dataclasses that the rest of the code uses.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from experts.errors import ConfigError
from experts.types import EngineSpec, ExpertSpec, SamplingParams

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Autoscaling(Section):
    """Ray runtime only; Ray Serve's own names."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 16


class BaseEngine(Section):
    options: dict[str, Any] = Field({}, description="Handed to the backend as they are.")
    memory_gib: PositiveFloat | None = Field(None, description="What the engine takes when loaded.")

    def spec(self, engine_id: str) -> EngineSpec:
        own = self.model_dump(exclude={"backend", "model", "options", "memory_gib"}, exclude_none=True)
        return EngineSpec(
            engine_id=engine_id,
            backend=self.backend,  # type: ignore[attr-defined]  # every subclass has one
            model=self.model,  # type: ignore[attr-defined]
            options={**own, **self.options},
            memory_gib=self.memory_gib,
        )


class VllmConfig(BaseEngine):
    """A vLLM engine: in this process, or as a ray.serve.llm deployment under the ray runtime."""

    backend: Literal["vllm"]
    model: str = Field(description="A name from 'collegium models list', a folder, or a model id.")
    adapters: dict[Name, str] = Field({}, description="LoRA adapters by name: a folder each.")
    autoscaling: Autoscaling | None = None


class OpenAIConfig(BaseEngine):
    """Any OpenAI-compatible endpoint."""

    backend: Literal["openai"]
    model: str
    base_url: str = Field(pattern=r"^https?://")
    api_key_env: str | None = Field(None, description="Environment variable that holds the key.")


class ServeConfig(BaseEngine):
    """A ray.serve.llm deployment that runs already."""

    backend: Literal["serve"]
    model: str = Field(description="Its model id.")
    deployment: str
    app: str = "default"


class RecordedConfig(BaseEngine):
    """Replays a recorded pool; an expert's adapter names the recorded expert (default: its own id)."""

    backend: Literal["recorded"]
    model: str = Field(description="The pool's folder.")


class FakeConfig(BaseEngine):
    """A scripted engine; see experts/fake.py for its options."""

    backend: Literal["fake"]
    model: str = "fake"


EngineConfig = Annotated[
    VllmConfig | OpenAIConfig | ServeConfig | RecordedConfig | FakeConfig, Field(discriminator="backend")
]


class ParamDefaults(Section):
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: PositiveInt | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None


class Demo(Section):
    question: str
    answer: str


class ExpertConfig(Section):
    engine: Name
    adapter: str | None = None
    system_prompt: str | None = None
    demos: tuple[Demo, ...] = ()
    examples: tuple[str, ...] = Field((), description="Questions this expert is good at, for routers.")
    description: str = ""
    defaults: ParamDefaults = ParamDefaults()
    context_length: PositiveInt | None = None
    usd_per_mtok_in: NonNegativeFloat = 0.0
    usd_per_mtok_out: NonNegativeFloat = 0.0
    tags: tuple[str, ...] = ()

    def spec(self, expert_id: str) -> ExpertSpec:
        same = self.model_dump(exclude={"engine", "demos", "defaults"})
        return ExpertSpec(
            expert_id=expert_id,
            engine_id=self.engine,
            demos=tuple((d.question, d.answer) for d in self.demos),
            defaults=SamplingParams(**self.defaults.model_dump()),
            **same,
        )


class RouterConfig(Section):
    name: str
    artefact: Path | None = Field(None, description="Folder of a fitted router.")
    options: dict[str, Any] = {}


class AggregatorConfig(Section):
    name: str
    options: dict[str, Any] = {}


class PolicyConfig(Section):
    """``router`` and ``aggregator`` may be given by name alone."""

    router: RouterConfig | str = "always"
    top_k: PositiveInt = 1
    aggregator: AggregatorConfig | str = "first"
    max_calls: PositiveInt | None = None
    max_usd: PositiveFloat | None = None


class Limits(Section):
    deadline_s: PositiveFloat = 120
    max_concurrency: PositiveInt = 256
    queue: int = Field(1024, ge=0)
    max_calls: PositiveInt = 8
    max_body_bytes: PositiveInt = 4 * 2**20
    max_messages: PositiveInt = 1024
    max_tokens: PositiveInt = 32768
    max_n: PositiveInt = 16
    client_stall_s: PositiveFloat = Field(30, description="A client that reads nothing for so long is cut off.")


class Resilience(Section):
    retries: int = Field(2, ge=0)
    backoff_s: PositiveFloat = 0.2
    first_chunk_s: PositiveFloat = Field(60, description="An expert silent for so long has failed.")
    breaker_failures: PositiveInt = 5
    breaker_open_s: PositiveFloat = 10
    hedge_after_s: PositiveFloat | None = Field(None, description="Ask the next best too after so long.")


class Residency(Section):
    slots: PositiveInt | None = None
    max_wait_s: PositiveFloat = 5
    min_loaded_s: NonNegativeFloat = 10


class ApiKey(Section):
    """A caller. The key itself stands in the environment, never in the file."""

    env: str
    models: tuple[str, ...] = Field((), description="What this key may ask for; empty: everything.")
    requests_per_minute: PositiveInt | None = None


class Security(Section):
    api_keys: dict[Name, ApiKey] = Field({}, description="By tenant. Empty: no key is asked for.")
    admin_key_env: str | None = Field(None, description="Opens POST /admin/reload.")


class Decisions(Section):
    keep: PositiveInt = 10_000
    path: Path | None = Field(None, description="SQLite file; without it decisions live in memory.")


class Telemetry(Section):
    otlp_endpoint: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Encoder(Section):
    model: str = "all-minilm-l6-v2"
    cache: PositiveInt = 10_000


class Config(Section):
    engines: dict[Name, EngineConfig] = Field(min_length=1)
    experts: dict[Name, ExpertConfig] = Field(min_length=1)
    policies: dict[Name, PolicyConfig] = Field(min_length=1)
    limits: Limits = Limits()
    residency: Residency = Residency()
    resilience: Resilience = Resilience()
    security: Security = Security()
    decisions: Decisions = Decisions()
    telemetry: Telemetry = Telemetry()
    encoder: Encoder = Encoder()


def load_config(path: Path) -> Config:
    """Read and check ``path``. Raises ConfigError that names the place, the mistake and the nearest right word."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"Cannot read {path}: {exc.strerror}. 'collegium init' writes one that works.") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not YAML: {exc}") from exc
    return parse_config(data, source=str(path))


def parse_config(data: object, *, source: str = "config") -> Config:
    """Check ``data``. Raises ConfigError with one line a mistake."""
    try:
        config = Config.model_validate(data)
    except ValidationError as exc:
        lines = [f"  {_explain(error)}" for error in exc.errors()]
        raise ConfigError(f"{source} has {len(lines)} mistake(s):\n" + "\n".join(lines)) from exc
    mistakes = _dangling(config)
    if mistakes:
        raise ConfigError(f"{source} has {len(mistakes)} mistake(s):\n" + "\n".join(f"  {m}" for m in mistakes))
    return config


def nearest(word: str, known: Sequence[str]) -> str:
    """'; did you mean X?' or the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}."


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"] if part not in _BACKENDS)
    if error["type"] != "extra_forbidden":
        return f"{place}: {error['msg']}"
    key = str(error["loc"][-1])
    return f"{place}: unknown key{nearest(key, _keys_at(error['loc'][:-1]))}"


_BACKENDS = ("vllm", "openai", "serve", "recorded", "fake")


def _keys_at(loc: tuple[Any, ...]) -> list[str]:
    """The keys that the section at ``loc`` may have, found in the JSON Schema."""
    schema = Config.model_json_schema()
    node: Mapping[str, Any] = schema
    for part in loc:
        node = _step(schema, node, part)
    return sorted(_resolve(schema, node).get("properties", {}))


def _step(schema: Mapping[str, Any], node: Mapping[str, Any], part: Any) -> Mapping[str, Any]:
    node = _resolve(schema, node)
    for choice in (node, *(_resolve(schema, c) for c in (*node.get("anyOf", ()), *node.get("oneOf", ())))):
        if part in choice.get("properties", {}):
            return dict(choice["properties"][part])
        if choice.get("properties", {}).get("backend", {}).get("const") == part or choice.get("title") == part:
            return choice
    named = next(iter(node.get("patternProperties", {}).values()), None)  # a dictionary whose keys are Names
    return dict(named or node.get("additionalProperties") or node.get("items") or {})


def _resolve(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    return schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def _dangling(config: Config) -> list[str]:
    """Names that point nowhere."""
    mistakes = [
        f"experts.{expert_id}.engine: no engine '{expert.engine}'{nearest(expert.engine, list(config.engines))}"
        for expert_id, expert in config.experts.items()
        if expert.engine not in config.engines
    ]
    if "default" not in config.policies:
        mistakes.append("policies: one must be called 'default'; it answers for the model 'collegium'.")
    mistakes += [f"experts.{e}: 'collegium' is the service's own name." for e in config.experts if e == "collegium"]
    return mistakes
