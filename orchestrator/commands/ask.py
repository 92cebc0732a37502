"""collegium ask: one question, here or at a running service."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.commands.options import Aggregator, ConfigFile, Expert, Json, Policy, RouterName, Text, TopK, Url
from orchestrator.commands.question import Explanation, Question
from orchestrator.commands.screen import make_console, show_calls, show_decision, waiting
from orchestrator.starter import find_config, read_config

app = typer.Typer(add_completion=False)


@app.command()
def ask(
    text: Text,
    config: ConfigFile = None,
    router: RouterName = None,
    top_k: TopK = None,
    aggregator: Aggregator = None,
    expert: Expert = None,
    policy: Policy = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show every call too.")] = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Show the answer as it comes.")] = True,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Ask one question. The answer goes to standard output, all else to standard error.

    Example: collegium ask "What is 17 + 25?" --explain
    """
    question = Question(text=text, router=router, top_k=top_k, aggregator=aggregator, expert=expert, policy=policy)
    view = Answer(stream=stream, silent=as_json)
    explanation = asyncio.run(_ask(question, view, config, url))
    if as_json:
        typer.echo(json.dumps({"answer": view.answer, **explanation}))
    else:
        view.close(explanation, explain=explain)


async def _ask(question: Question, view: "Answer", config: Path | None, url: str | None) -> Explanation:
    if url is not None:
        from orchestrator.commands import remote

        return await remote.ask(url, question, view)
    from orchestrator.commands import local

    return await local.ask(read_config(find_config(config)), question, view)


class Answer:
    """The View on a terminal; ``silent`` collects only."""

    def __init__(self, *, stream: bool, silent: bool) -> None:
        self._stream = stream and not silent
        self._silent = silent
        self._console = make_console()
        self._pieces: list[str] = []
        self._mid_line = False

    @property
    def answer(self) -> str:
        return "".join(self._pieces)

    def routed(self, decision: Mapping[str, Any]) -> None:
        if not self._silent:
            self._end_line()
            show_decision(self._console, decision)

    def text(self, piece: str) -> None:
        self._pieces.append(piece)
        if self._stream:
            self._print(piece)

    def waiting(self, what: str) -> AbstractContextManager[None]:
        return nullcontext() if self._silent else waiting(self._console, what)

    def close(self, explanation: Explanation, *, explain: bool) -> None:
        if not self._stream:
            self._print(self.answer)
        self._end_line()
        if explain:
            show_calls(self._console, explanation)
        usage = explanation["usage"]
        self._console.print(
            f"[dim]{usage['prompt_tokens']} + {usage['completion_tokens']} tokens, "
            f"{explanation['latency_ms'] / 1e3:.2f} s, {explanation['usd']:.6f} USD[/]"
        )

    def _print(self, piece: str) -> None:
        typer.echo(piece, nl=False)
        self._mid_line = not piece.endswith("\n") if piece else self._mid_line

    def _end_line(self) -> None:
        if self._mid_line:
            self._print("\n")
