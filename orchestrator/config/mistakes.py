"""A mistake in the config, in words: where it is, what it is, and the nearest right word."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from experts.types import Backend
from orchestrator.config.models import Config, Section, VllmConfig


def nearest(word: str, known: Sequence[str]) -> str:
    """'; did you mean X?' or the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known) or 'none'}."


def explain(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors."""
    place, given = _place(error["loc"]), error["input"]
    match error["type"]:
        case "extra_forbidden":
            return f"{place}: unknown key{nearest(str(error['loc'][-1]), _keys_at(error['loc'][:-1]))}"
        case "missing":
            return f"{place}: is missing."
        case "model_type" | "dict_type":
            keys = _keys_at(error["loc"])
            return f"{place}: must be a mapping{' with the keys ' + ', '.join(keys) if keys else ''}."
        case "union_tag_invalid":
            return (
                f"{place}.backend: no backend '{given['backend']}'{nearest(str(given['backend']), get_args(Backend))}"
            )
        case "union_tag_not_found":
            return f"{place}: needs a backend: one of {', '.join(get_args(Backend))}."
        case "string_pattern_mismatch" if error["loc"][-1] == "[key]":
            return f"{place}: no name; it takes 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first."
        case "string_pattern_mismatch" if str(error["loc"][-1]).endswith("env"):
            return f"{place}: takes the name of an environment variable that holds the key, never the key itself."
        case _:
            shown = f", not {given!r}" if given is None or isinstance(given, int | float) else ""
            return f"{place}: {error['msg']}{shown}."


def _place(loc: Sequence[Any]) -> str:
    """As it stands in the file: pydantic also names the branch of the union it took, and '[key]' for a key."""
    parts = [str(part) for i, part in enumerate(loc) if part != "[key]" and not (loc[0] == "engines" and i == 2)]
    return ".".join(parts) or "the file"


def _keys_at(loc: Sequence[Any]) -> list[str]:
    kinds: list[Any] = [Config]
    for part in loc:
        kinds = [inner for kind in kinds for inner in _inside(kind, part)]
    return sorted({key for kind in kinds if _is_section(kind) for key in kind.model_fields})


def _inside(kind: Any, part: Any) -> list[Any]:
    """What may stand under ``part`` of a section, a mapping or a list; an engine's backend stands for the engine."""
    if not _is_section(kind):
        inner = get_args(kind)
        return _members(inner[1] if get_origin(kind) is dict else inner[0]) if inner else []
    if part in kind.model_fields:
        return _members(kind.model_fields[part].annotation)
    backend = kind.model_fields.get("backend")
    return [kind] if backend is not None and part in get_args(backend.annotation) else []


def _members(kind: Any) -> list[Any]:
    """The types in a union, however it is written."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for choice in get_args(kind) for member in _members(choice)]
    return [kind]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Section)


def contradictions(config: Config) -> Iterator[str]:
    """Names that point nowhere, and values that do not go together."""
    if "default" not in config.policies:
        yield "policies: one must be called 'default'; it answers for the model 'collegium'."
    for engine_id in config.engines:
        yield from _in_engine(engine_id, config)
    for expert_id in config.experts:
        yield from _in_expert(expert_id, config)
    for name in config.policies:
        yield from _in_policy(name, config)
    models = ["collegium", *(f"collegium/{p}" for p in config.policies), *config.experts]
    for tenant, key in config.security.api_keys.items():
        for model in key.models:
            if model not in models:
                yield f"security.api_keys.{tenant}.models: no model '{model}'{nearest(model, models)}"


def _in_engine(engine_id: str, config: Config) -> Iterator[str]:
    engine = config.engines[engine_id]
    for key in engine.options.keys() & type(engine).model_fields.keys():
        yield f"engines.{engine_id}.options.{key}: stands beside 'options', not in it."
    scaling = engine.autoscaling if isinstance(engine, VllmConfig) else None
    if scaling is not None and scaling.min_replicas > scaling.max_replicas:
        yield f"engines.{engine_id}.autoscaling: min_replicas is above max_replicas."


def _in_expert(expert_id: str, config: Config) -> Iterator[str]:
    expert = config.experts[expert_id]
    engine = config.engines.get(expert.engine)
    if expert_id == "collegium":
        yield "experts.collegium: is the service's own name; take another."
    if engine is None:
        known = list(config.engines)
        yield f"experts.{expert_id}.engine: no engine '{expert.engine}'{nearest(expert.engine, known)}"
    elif isinstance(engine, VllmConfig) and expert.adapter is not None and expert.adapter not in engine.adapters:
        known = list(engine.adapters)
        yield (
            f"experts.{expert_id}.adapter: engine '{expert.engine}' has no adapter '{expert.adapter}'"
            f"{nearest(expert.adapter, known)}"
        )


def _in_policy(name: str, config: Config) -> Iterator[str]:
    policy, limit = config.policies[name], config.limits.max_calls
    if policy.max_calls is not None and policy.max_calls > limit:
        yield f"policies.{name}.max_calls: {policy.max_calls} is above limits.max_calls, {limit}."
    if policy.top_k > (policy.max_calls or limit):
        yield f"policies.{name}.top_k: {policy.top_k} experts need as many max_calls, not {policy.max_calls or limit}."
    if (policy.quorum is None) != (policy.late_s is None):
        yield f"policies.{name}: quorum and late_s go together: how many answers are enough, and after how long."
    if policy.quorum is not None and policy.quorum > policy.top_k:
        yield f"policies.{name}.quorum: {policy.quorum} answers cannot come of {policy.top_k} experts (top_k)."
