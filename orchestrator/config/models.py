"""What may stand in ``collegium.yaml``: pydantic models. ``spec`` methods turn them into the dataclasses that the rest
of the code uses."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from experts.types import Backend, EngineSpec, ExpertSpec, SamplingParams

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Of an environment variable that holds a key. Most keys are no such name: one that is put here by mistake is refused,
and not repeated in an error or a log."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Autoscaling(Section):
    """Ray runtime only; Ray Serve's own names."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 16


class BaseEngine(Section):
    backend: Backend
    model: str
    options: dict[str, Any] = Field({}, description="Handed to the backend as they are.")
    memory_gib: PositiveFloat | None = Field(None, description="What the engine takes when loaded.")

    def spec(self, engine_id: str) -> EngineSpec:
        own = self.model_dump(exclude={"backend", "model", "options", "memory_gib"}, exclude_none=True)
        return EngineSpec(
            engine_id=engine_id,
            backend=self.backend,
            model=self.model,
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
    api_key_env: EnvName | None = Field(None, description="Environment variable that holds the key.")
    options: dict[str, Any] = Field({}, description="How to talk to it: the last table of docs/config.md.")


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
    artefact: Path | None = Field(None, description="Folder of a fitted aggregator or reward.")
    options: dict[str, Any] = {}


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class PolicyConfig(Section):
    """``router`` and ``aggregator`` may be given by name alone."""

    router: Annotated[RouterConfig, BeforeValidator(_named, json_schema_input_type=RouterConfig | str)] = RouterConfig(
        name="always"
    )
    top_k: PositiveInt = 1
    aggregator: Annotated[AggregatorConfig, BeforeValidator(_named, json_schema_input_type=AggregatorConfig | str)] = (
        AggregatorConfig(name="first")
    )
    max_calls: PositiveInt | None = None
    max_usd: PositiveFloat | None = None
    one_by_one: bool = Field(False, description="Ask one expert after another, and stop when the rest cannot matter.")
    quorum: PositiveInt | None = Field(None, description="How many answers are enough after late_s.")
    late_s: PositiveFloat | None = Field(None, description="How long all are waited for before quorum is enough.")


class Limits(Section):
    deadline_s: PositiveFloat = 120
    max_concurrency: PositiveInt = 256
    queue: int = Field(1024, ge=0)
    max_calls: PositiveInt = Field(8, description="What no policy and no request may exceed.")
    max_body_bytes: PositiveInt = 4 * 2**20
    max_messages: int = Field(1024, ge=1, le=16384)
    max_tokens: PositiveInt = 32768
    max_n: PositiveInt = 16
    client_stall_s: PositiveFloat = Field(30, description="A client that reads nothing for so long is cut off.")


class Resilience(Section):
    retries: int = Field(2, ge=0, le=10)
    backoff_s: PositiveFloat = 0.2
    first_chunk_s: PositiveFloat = Field(
        60, description="A stream silent for so long has failed; an answer wanted whole, after 3/4 of the deadline."
    )
    breaker_failures: PositiveInt = 5
    breaker_open_s: PositiveFloat = 10
    hedge_after_s: PositiveFloat | None = Field(None, description="Ask the next best too after so long.")


class Residency(Section):
    """Fewer engines in memory than in the config. Without slots and memory_gib every engine is loaded at the start and
    stays. Engines of backend openai, recorded and serve are always there and take no room. See docs/batching.md."""

    slots: PositiveInt | None = Field(None, description="Engines loaded at a time.")
    memory_gib: PositiveFloat | None = Field(
        None, description="What they may take together: each by its own memory_gib, until a load has been measured."
    )
    max_wait_s: PositiveFloat = Field(5, description="After so long a call's engine comes next, whatever runs.")
    min_loaded_s: NonNegativeFloat = Field(10, description="No engine goes sooner, unless for a call that is due.")
    load_timeout_s: PositiveFloat = Field(600, description="A load that takes longer has failed.")
    load_retries: int = Field(1, ge=0, le=10)
    load_backoff_s: PositiveFloat = Field(1, description="Before the second try; doubles with each.")
    failed_s: PositiveFloat = Field(60, description="An engine that does not load is left alone for so long.")
    queue: PositiveInt = Field(10_000, description="Calls that may wait for engines to be loaded.")
    sleep: Literal[1, 2] | None = Field(
        None,
        description="GPU only: vllm engines that go sleep instead of ending. 1 keeps their weights in this machine's "
        "memory, 2 reads them again.",
    )

    @property
    def limited(self) -> bool:
        return self.slots is not None or self.memory_gib is not None


class ApiKey(Section):
    """A caller. The key itself stands in the environment, never in the file."""

    env: EnvName
    models: tuple[str, ...] = Field((), description="What this key may ask for; empty: everything.")
    requests_per_minute: PositiveInt | None = None


class Security(Section):
    api_keys: dict[Name, ApiKey] = Field({}, description="By tenant. Empty: no key is asked for.")
    admin_key_env: EnvName | None = Field(None, description="Opens POST /admin/reload.")


class Decisions(Section):
    keep: PositiveInt = 10_000
    path: Path | None = Field(None, description="SQLite file; without it decisions live in memory.")


class Batches(Section):
    """Files of requests. Over HTTP they are closed as long as there is no path; see docs/batching.md."""

    path: Path | None = Field(None, description="Folder for files, batches and their state.")
    max_file_bytes: PositiveInt = 200 * 2**20
    max_lines: PositiveInt = 1_000_000
    max_files: PositiveInt = Field(1000, description="Files a tenant may keep; what batches wrote is not counted.")
    max_unfinished: PositiveInt = Field(100, description="Batches of a tenant that wait or run.")
    at_a_time: PositiveInt = Field(1, description="Batches that run; the others wait for their turn.")
    deadline_s: PositiveFloat = Field(
        3600, description="A call that takes longer has failed: an engine that hangs must not hold a batch forever."
    )
    window: int = Field(64, ge=1, le=4096, description="Calls of one engine that a batch has under way at a time.")


class Telemetry(Section):
    otlp_endpoint: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Encoder(Section):
    model: str = "all-minilm-l6-v2"
    runtime: Literal["auto", "ctranslate2", "torch", "onnx"] = Field(
        default="auto", description="What runs it; auto is the fastest that is installed."
    )
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
    batches: Batches = Batches()
    telemetry: Telemetry = Telemetry()
    encoder: Encoder = Encoder()
