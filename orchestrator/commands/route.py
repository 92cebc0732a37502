"""collegium route: who would be asked, without asking."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from orchestrator.commands.ask import Answer
from orchestrator.commands.options import ConfigFile, Json, Policy, RouterName, Text, TopK, Url
from orchestrator.commands.question import Question
from orchestrator.commands.screen import make_console, show_decision
from orchestrator.starter import find_config, read_config

app = typer.Typer(add_completion=False)


@app.command()
def route(
    text: Text,
    config: ConfigFile = None,
    router: RouterName = None,
    top_k: TopK = None,
    policy: Policy = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Show the decision only; nothing is generated and no engine is loaded.

    Example: collegium route "How do you say bread in French?" --policy panel
    """
    question = Question(text=text, router=router, top_k=top_k, policy=policy)
    decision = asyncio.run(_route(question, Answer(stream=False, silent=as_json), config, url))
    if as_json:
        typer.echo(json.dumps(decision))
    else:
        show_decision(make_console(stderr=False), decision)


async def _route(question: Question, view: Answer, config: Path | None, url: str | None) -> Mapping[str, Any]:
    if url is not None:
        from orchestrator.commands import remote

        return await remote.route(url, question)
    from orchestrator.commands import local

    return await local.route(read_config(find_config(config)), question, view)
