"""collegium router prompts: prompt experts out of demonstrations."""

import asyncio
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experts.errors import ConfigError
from orchestrator.commands.options import ConfigFile

if TYPE_CHECKING:
    from experts.base import Expert
    from orchestrator.build import Service
    from routers.prompt_search import Pair, PromptExpert

_LEAST = 8
"""Demonstrations, and a quarter as many validation questions: fewer say nothing."""


def prompts(
    demos: Annotated[Path, typer.Option(help='Demonstrations: a line each, {"question": ..., "answer": ...}.')],
    expert: Annotated[str, typer.Option(help="The expert of the config that the prompts are for.")],
    out: Annotated[Path, typer.Option(help="Folder for the router and the experts.")],
    config: ConfigFile = None,
    validation: Annotated[
        Path | None, typer.Option(help="Validation questions, of the same form; else a fifth of the demonstrations.")
    ] = None,
    regions: Annotated[int | None, typer.Option(min=1, help="How many prompts; found by itself without.")] = None,
    shown: Annotated[int, typer.Option(min=1, help="Demonstrations in a prompt at most.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Regions and proposals are drawn with it.")] = 0,
) -> None:
    """Make prompt experts: group demonstrations, and find an instruction for each group (mixture of prompts).

    Example: collegium router prompts --demos demos.jsonl --expert generalist --out artefacts/prompts
    """
    from orchestrator.commands.screen import make_console, waiting
    from orchestrator.starter import find_config, read_config

    console = make_console(stderr=True)
    given = read_pairs(demos)
    held = read_pairs(validation) if validation is not None else given[::5]
    learned = given if validation is not None else [p for i, p in enumerate(given) if i % 5]
    if shared := set(learned) & set(held):
        raise ConfigError(f"{len(shared)} demonstrations are validation questions too, such as {min(shared)[0]!r}.")
    if len(learned) < _LEAST or len(held) < _LEAST // 4:
        raise ConfigError(f"{len(learned)} demonstrations and {len(held)} validation questions are too few.")
    with waiting(console, "searching for prompts"):
        found = asyncio.run(_make(read_config(find_config(config)), expert, learned, held, regions, shown, seed, out))
    for number, one in enumerate(found, 1):
        words = one.instruction or "(no instruction)"
        console.print(f"{number}. {one.validated:.2f} on {one.queries}: {words}", markup=False)
    console.print(
        f"Add the experts of {out / 'experts.yaml'} to the config, and a policy:\n"
        f"  router: {{name: prompts, artefact: {out}}}",
        markup=False,
    )


def read_pairs(path: Path) -> list["Pair"]:
    """Raises ConfigError that names the row."""
    import orjson

    try:
        lines = path.read_bytes().splitlines()
    except OSError as exc:
        raise ConfigError(f"Cannot read {path}: {exc.strerror}.") from exc
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
            question, answer = row["question"], row["answer"]
        except (orjson.JSONDecodeError, KeyError, TypeError) as exc:
            raise ConfigError(f'{path}, row {number}: not of the form {{"question": .., "answer": ..}}.') from exc
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
            raise ConfigError(f"{path}, row {number}: 'question' and 'answer' are texts.")
        pairs.append((question, answer))
    return pairs


async def _make(
    config: Any,
    expert_id: str,
    demos: Sequence["Pair"],
    held: Sequence["Pair"],
    regions: int | None,
    shown: int,
    seed: int,
    out: Path,
) -> list["PromptExpert"]:
    from orchestrator.build import build_service, make_engine
    from orchestrator.commands.local import OnDemand
    from routers.prompt_search import search_prompts
    from routers.prompts import Regions
    from routers.regions import split_regions

    service = build_service(config, make=lambda spec: OnDemand(make_engine(spec)))
    if expert_id not in service.experts:
        raise ConfigError(f"No expert '{expert_id}'; known: {', '.join(service.experts)}.")
    try:
        encoder = service.encoder()
        vectors = await encoder.encode([q for q, _ in demos])
        centroids, split = split_regions(vectors, seed, regions=regions)
        asked = _Asked(service.experts[expert_id])
        found = await search_prompts(
            demos,
            split,
            centroids,
            held,
            await encoder.encode([q for q, _ in held]),
            propose=asked.propose,
            grade=asked.grade,
            seed=seed,
            most_demos=shown,
        )
    finally:
        for engine in service.engines.values():
            await engine.unload()
    ids = tuple(f"{expert_id}-{number}" for number in range(1, len(found) + 1))
    made = Regions(expert_ids=ids, centroids_KW=centroids, encoder=encoder.name, demos_digest=_digest(demos))
    made.save(out, {"expert": expert_id, "seed": seed, "prompts": [_about(p) for p in found]})
    _write_experts(service, expert_id, ids, found, out / "experts.yaml")
    return found


class _Asked:
    """The expert as search_prompts wants it."""

    def __init__(self, expert: "Expert") -> None:
        self._expert = expert

    async def propose(self, pairs: Sequence["Pair"], number: int) -> str:
        shown = "\n\n".join(f"Input: {q}\nOutput: {a}" for q, a in pairs)
        text = (
            "Somebody was given an instruction and produced these outputs from these inputs. Write the instruction in "
            f"one sentence and nothing else.\n\n{shown}\n\nInstruction:"
        )
        return (await self._ask(text, (), temperature=0.9, seed=number, max_tokens=64)).strip().strip('"')

    async def grade(self, instruction: str, demos: Sequence["Pair"], query: "Pair") -> float:
        from orchestrator.aggregators.extract import make_extract, same

        said = await self._ask(query[0], demos, instruction=instruction, temperature=0.0, seed=0, max_tokens=128)
        if _plain(said) == _plain(query[1]):
            return 1.0
        read = make_extract("auto", None)(said, _asked(query[0]))
        return float(read is not None and same(read, query[1]))

    async def _ask(
        self,
        text: str,
        demos: Sequence["Pair"],
        *,
        instruction: str = "",
        temperature: float,
        seed: int,
        max_tokens: int,
    ) -> str:
        from experts.base import collect
        from experts.types import Message, Request, SamplingParams

        messages = [Message(role="system", content=instruction)] if instruction else []
        for question, answer in demos:
            messages += [Message(role="user", content=question), Message(role="assistant", content=answer)]
        request = Request(
            messages=(*messages, Message(role="user", content=text)),
            params=SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens),
            stream=False,
            priority="batch",
        )
        return (await collect(self._expert.generate(request), request)).text


def _asked(question: str) -> Any:
    from experts.types import Request
    from orchestrator.aggregators.extract import read_request

    return read_request(Request(prompt=question))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")


def _digest(demos: Sequence["Pair"]) -> str:
    digest = blake2b(digest_size=32)
    for question, answer in demos:
        digest.update(f"{len(question)} {len(answer)} {question}{answer}".encode(errors="replace"))
    return digest.hexdigest()


def _about(found: "PromptExpert") -> dict[str, object]:
    return {
        "instruction": found.instruction,
        "demos": [list(pair) for pair in found.demos],
        "validated": round(found.validated, 4),
        "queries": found.queries,
    }


def _write_experts(
    service: "Service", expert_id: str, ids: Sequence[str], found: Sequence["PromptExpert"], path: Path
) -> None:
    """As they stand under 'experts' of a config: the expert's own engine and settings, another prompt."""
    import yaml

    own = service.config.experts[expert_id].model_dump(mode="json", exclude_defaults=True)
    experts = {
        new_id: {
            **own,
            **({"system_prompt": one.instruction} if one.instruction else {}),
            "demos": [{"question": q, "answer": a} for q, a in one.demos],
        }
        for new_id, one in zip(ids, found, strict=True)
    }
    path.write_text(yaml.safe_dump({"experts": experts}, sort_keys=False, allow_unicode=True))
