"""docs/config.md, made from the config's own models: ``python -m orchestrator.config.reference > docs/config.md``."""

from collections.abc import Iterator, Mapping
from typing import Any

from experts.endpoint import BESIDE, Options
from orchestrator.config.models import Config

HEAD = """# collegium.yaml

Made by `python -m orchestrator.config.reference > docs/config.md`. `collegium init` writes a commented file that works
as it stands; `collegium init --schema` prints this page as JSON Schema, for your editor. A key that is not listed here
is an error that names the nearest one.
"""

OPTIONS = "Options of an openai engine"


def reference() -> str:
    """The page, in Markdown: a table for the file and for each section in it."""
    schema, endpoint = Config.model_json_schema(), Options.model_json_schema()
    options = {key: node for key, node in endpoint["properties"].items() if key not in BESIDE}
    about = "Times in seconds."
    sections = {"Config": schema, **schema["$defs"], OPTIONS: {"description": about, "properties": options}}
    return HEAD + "".join(line + "\n" for name, section in sections.items() for line in _section(name, section))


def _section(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    title = "The file" if name == "Config" else name.removesuffix("Config")
    yield f"\n## {title}\n"
    if text := section.get("description"):
        yield " ".join(text.split()) + "\n"
    yield "| key | what it takes | default | |"
    yield "|---|---|---|---|"
    required = section.get("required", ())
    for key, node in section["properties"].items():
        default = "**required**" if key in required else _default(node)
        yield f"| `{key}` | {_kind(node)} | {default} | {node.get('description', '')} |"


def _default(node: Mapping[str, Any]) -> str:
    value = node.get("default")
    return "its own" if "$ref" in node and isinstance(value, Mapping) else f"`{_yaml(value)}`"


def _kind(node: Mapping[str, Any]) -> str:
    choices = node.get("oneOf") or node.get("anyOf")
    if choices:
        return " or ".join(_kind(c) for c in choices if c.get("type") != "null")
    if "$ref" in node:
        return _link(node["$ref"].rsplit("/", 1)[1])
    if "const" in node or "enum" in node:
        return ", ".join(f"`{v}`" for v in node.get("enum", [node.get("const")]))
    match node.get("type"):
        case "array":
            return f"list of {_kind(node.get('items', {}))}"
        case "object":
            values = node.get("additionalProperties") or next(iter(node.get("patternProperties", {}).values()), True)
            return f"mapping of name to {_kind(values)}" if isinstance(values, Mapping) else "mapping"
        case kind:
            return f"{kind or 'anything'}{_bounds(node)}"


def _link(name: str) -> str:
    title = name.removesuffix("Config")
    return f"[{title}](#{title.lower()})"


def _bounds(node: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    told = [f"{sign} {node[key]:g}" for key, sign in signs.items() if key in node]
    return f" {', '.join(told)}" if told else ""


def _yaml(value: Any) -> str:
    """Flow style, as one would write it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items() if v not in (None, [], {}, "")) + "}"
    if value is None:
        return "null"
    return str(value) if value != "" else '""'


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201  # this page is its output
