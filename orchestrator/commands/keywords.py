"""collegium router keywords: what skills each question of a pool takes, by an expert's word."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from experts.errors import ConfigError
from orchestrator.commands.options import ConfigFile

_FORM = 'not of the form {"id": .., "keywords": [..]}.'


def keywords(
    pool: Annotated[Path, typer.Option(help="Folder of a recorded pool.")],
    expert: Annotated[str, typer.Option(help="The expert of the config that is asked.")],
    out: Annotated[Path, typer.Option(help="JSON lines; questions that are in it already are not asked again.")],
    config: ConfigFile = None,
    split: Annotated[str, typer.Option(help="The split whose questions are asked about.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="No more questions than these.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Answers a question; what two of them name is kept.")] = 5,
) -> None:
    """Ask an expert for the keywords of a pool's questions, for: collegium router fit skills --keywords FILE.

    Example: collegium router keywords --pool pools/mmlu-pro --expert generalist --out keywords.jsonl
    """
    from orchestrator.commands.screen import bars, make_console
    from orchestrator.starter import find_config, read_config
    from routers.records import read_records

    console = make_console(stderr=True)
    records = read_records(pool)
    known = read_keywords(out) if out.is_file() else {}
    rows = [int(r) for r in records.rows(split)][:limit]
    left = [r for r in rows if records.question_ids[r] not in known]
    with bars(console) as progress:
        progress.start(f"asking '{expert}'", len(left), "bytes")
        questions = [(records.question_ids[r], records.texts[r]) for r in left]
        asyncio.run(_ask(read_config(find_config(config)), expert, questions, samples, out, progress))
    console.print(f"Keywords of {len(rows)} questions are in {out}.", markup=False)


def read_keywords(path: Path) -> dict[str, list[str]]:
    """By question id. Raises ConfigError that names the row."""
    import orjson

    found: dict[str, list[str]] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as exc:
        raise ConfigError(f"Cannot read {path}: {exc.strerror}.") from exc
    for number, line in enumerate(lines, 1):
        try:
            row = orjson.loads(line)
            question_id, own = row["id"], row["keywords"]
        except (orjson.JSONDecodeError, KeyError, TypeError) as exc:
            raise ConfigError(f"{path}, row {number}: {_FORM}") from exc
        if not isinstance(own, list) or not all(isinstance(k, str) and k for k in own):
            raise ConfigError(f"{path}, row {number}: {_FORM}")
        found[str(question_id)] = own
    return found


def keywords_for(question_ids: Sequence[str], known: Mapping[str, Sequence[str]], path: Path) -> list[list[str]]:
    """In the order of ``question_ids``. Raises ConfigError where some are missing: a profile counts every question."""
    missing = [q for q in question_ids if q not in known]
    if missing:
        raise ConfigError(
            f"{path} has no keywords for {len(missing)} of {len(question_ids)} questions, such as {missing[0]!r}; make "
            "them with: collegium router keywords."
        )
    return [list(known[q]) for q in question_ids]


async def _ask(
    config: Any, expert_id: str, questions: Sequence[tuple[str, str]], samples: int, out: Path, progress: Any
) -> None:
    import orjson

    from orchestrator.build import build_service, make_engine
    from orchestrator.commands.local import OnDemand
    from routers.keywords import LlmKeywords

    service = build_service(config, make=lambda spec: OnDemand(make_engine(spec)))
    if expert_id not in service.experts:
        raise ConfigError(f"No expert '{expert_id}'; known: {', '.join(service.experts)}.")
    source, places = LlmKeywords(service.experts[expert_id], samples=samples, cache=1), asyncio.Semaphore(8)

    async def one(question_id: str, text: str) -> bytes:
        async with places:
            return orjson.dumps({"id": question_id, "keywords": await source.of(text)}) + b"\n"

    try:
        with out.open("ab") as file:
            for done in asyncio.as_completed([one(*q) for q in questions]):
                file.write(await done)
                progress.advance(1)
    finally:
        for engine in service.engines.values():
            await engine.unload()
