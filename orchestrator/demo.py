"""'make demo': the service on its embedded default, four questions over HTTP, and an end that leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from experts.errors import CollegiumError, ExpertFailed
from experts.models import cache_dir, prepare
from orchestrator.commands.screen import bars, show_decision, waiting

if TYPE_CHECKING:
    from openai import OpenAI

QUESTIONS = (
    "What is the capital of France?",
    "Sara has 5 boxes with 6 pens each. How many pens does she have?",
    "How do you say good night in French?",
    "Write a Python function that returns the square of a number.",
)
MODELS = ("smollm2-135m-instruct", "all-minilm-l6-v2")
START_S = 600
STOP_S = 30


def main() -> int:
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _demo(console)
    except CollegiumError as exc:
        console.print(f"[red]The demo failed:[/] {escape(exc.message)}")
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    return 0


def _demo(console: Console) -> None:
    for model in MODELS:
        with bars(console) as progress:
            prepare(model, progress)
        console.print(f"Model {model} is prepared.")
    with _service(console) as url:
        _ask_all(url, console)
    console.print("\nThe service is stopped; nothing is left running. Next: [bold]collegium ask[/], [bold]serve[/].")


def _ask_all(url: str, console: Console) -> None:
    from openai import OpenAI, OpenAIError

    try:
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            for question in QUESTIONS:
                _ask(client, question, console)
    except OpenAIError as exc:
        raise ExpertFailed(f"the service did not answer: {exc}") from exc


def _ask(client: "OpenAI", question: str, console: Console) -> None:
    """One streamed chat by the plain OpenAI client; the service's own explanation comes with the last event."""
    console.print(f"\n[bold cyan]> {question}[/]")
    stream = client.chat.completions.create(
        model="collegium",
        messages=[{"role": "user", "content": question}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"collegium": {"explain": True}},
    )
    told: dict[str, Any] = {}
    with stream:
        for chunk in stream:
            for choice in chunk.choices:
                console.print(choice.delta.content or "", end="", markup=False)
            told |= chunk.model_extra or {}
    console.print()
    _explain(told["collegium"], console)


def _explain(told: dict[str, Any], console: Console) -> None:
    show_decision(console, told["decision"])
    usage, (call, *_) = told["usage"], told["calls"]
    console.print(
        f"[dim]{usage['prompt_tokens']} + {usage['completion_tokens']} tokens, first after {call['ttft_ms']:.0f} ms, "
        f"all after {told['latency_ms']:.0f} ms[/]"
    )


@contextmanager
def _service(console: Console) -> Iterator[str]:
    """The URL of a 'collegium serve' in a process group of its own, ready; all of the group is ended with the block."""
    with tempfile.TemporaryDirectory(prefix="collegium-demo-") as folder:
        port, log = _free_port(), Path(folder) / "serve.log"
        command = [sys.executable, "-m", "orchestrator.cli", "serve", "--port", str(port)]
        environment = {**os.environ, "COLLEGIUM_CACHE": str(cache_dir())}
        with log.open("wb") as output:
            # In the empty folder, so that the embedded default counts and no collegium.yaml of the user's.
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            with waiting(console, f"Starting the service on port {port}"):
                _wait_until_ready(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            with waiting(console, "Stopping the service"):
                _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        state = _readiness(url)
        if state["ready"]:
            return
        if any(str(engine).startswith("failed") for engine in state["engines"].values()):
            break
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise ExpertFailed(f"the service did not get ready. 'collegium doctor' may know why; its log ends with:\n{tail}")


def _readiness(url: str) -> dict[str, Any]:
    """The body of /readyz, which also says why it is not; before the port answers, that nothing is known."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as reply:  # noqa: S310  # our own service
            return dict(json.load(reply))
    except urllib.error.HTTPError as exc:
        with exc:
            return dict(json.load(exc))
    except OSError:
        return {"ready": False, "engines": {}}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The service by SIGTERM, which ends its engines; what is left of its group after STOP_S by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave engines behind
    with suppress(ProcessLookupError):
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        os.killpg(process.pid, signal.SIGKILL)
        _wait_until_gone(process)


def _wait_until_gone(process: subprocess.Popen[bytes]) -> None:
    """Returns when no process of the group is left, or after a while: where nobody reaps orphans their names stay.

    Raises ProcessLookupError when there is none.
    """
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        process.poll()
        os.killpg(process.pid, 0)
        time.sleep(0.02)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
