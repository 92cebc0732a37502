"""Three vLLM engines, room for one, 90 questions in random order, two experts each: grouped against line by line.

    python -m evals.batching.real --out DIR          # an hour or two: line by line, each question waits for its loads

Both orders run through ``collegium batch run``, each in a process of its own, over the same lines. Cut off, the same
command goes on. Answers are compared word for word, at temperature 0 and in float32: in bfloat16 a token's neighbours
in its batch change how its sums are rounded.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from evals.batching.models import make_models

LINES, SEED = 90, 7
COUNTRIES = """
    France Italy Spain Germany Austria Poland Norway Sweden Finland Denmark Greece Portugal Ireland Hungary Egypt Kenya
    Ghana Morocco Japan China India Nepal Thailand Vietnam Canada Cuba Mexico Peru Chile Brazil
""".split()  # noqa: SIM905  # thirty in three lines
THINGS = """
    bread water house garden river mountain winter summer mother brother school teacher window door table chair horse
    dog cat bird fish apple cheese wine milk train street town church friend
""".split()  # noqa: SIM905
KINDS = {
    "base": [f"What is the capital of {country}?" for country in COUNTRIES],
    "merged": [f"Tom has {3 + i} boxes with {2 + i % 7} pens each. How many pens does he have?" for i in range(30)],
    "mixtral": [f"What is the French word for '{thing}'?" for thing in THINGS],
}
"""The questions that each engine's expert is said to be good at, for the router centroid."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="Folder for models, lines, answers and reports.")
    parser.add_argument("--orders", default="grouped,arrival", help="Which to run, in this order.")
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    config = write_config(out)
    source = write_lines(out)
    for order in given.orders.split(","):
        _run(order, config, source, out)
    reports = {order: report for order in ("grouped", "arrival") if (report := _report(out, order))}
    for line in compare(reports, {order: read_answers(out / f"{order}.jsonl") for order in reports}):
        print(line)


def compare(reports: Mapping[str, Mapping[str, Any]], answers: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """The figures of each order, their ratio, and how many answers are the same."""
    columns = ("loads", "load_s", "generate_s", "wall_s", "expert_calls", "lost", "duplicated")
    yield f"{'order':9}" + "".join(f"{name:>13}" for name in columns)
    for order, report in reports.items():
        yield f"{order:9}" + "".join(f"{report[name]:>13}" for name in columns)
    if len(reports) == 2:
        grouped, arrival = answers["grouped"], answers["arrival"]
        same = sum(grouped.get(name) == text for name, text in arrival.items())
        yield f"wall time, arrival / grouped: {reports['arrival']['wall_s'] / reports['grouped']['wall_s']:.1f}"
        yield f"answers that are the same: {same} of {max(len(grouped), len(arrival))}"


def read_answers(path: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in rows}


def write_config(out: Path) -> Path:
    options = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 32, "kv_cache_memory_bytes": 2**28}
    models = make_models(out / "models")
    config = {
        "engines": {n: {"backend": "vllm", "model": str(folder), "options": options} for n, folder in models.items()},
        "experts": {name: {"engine": name, "examples": KINDS[name][::3]} for name in models},
        "policies": {"default": {"router": "centroid", "top_k": 2, "aggregator": "vote"}},
        "limits": {"deadline_s": 600},
        "residency": {"slots": 1},
    }
    path = out / "collegium.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def write_lines(out: Path) -> Path:
    questions = [q for kind in KINDS.values() for q in kind]
    random.Random(SEED).shuffle(questions)  # noqa: S311  # an order, not a secret
    path = out / "lines.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i, question in enumerate(questions[:LINES]):
            messages = [{"role": "user", "content": question}]
            body = {"model": "collegium", "messages": messages, "temperature": 0, "max_tokens": 24}
            line = {"custom_id": f"q{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def _run(order: str, config: Path, source: Path, out: Path) -> None:
    target = out / f"{order}.jsonl"
    if target.exists():
        return
    resume = ["--resume"] if target.with_name(f"{target.name}.state.sqlite").exists() else []
    command = [sys.executable, "-m", "orchestrator.cli", "batch", "run", str(source), "--out", str(target)]
    started = time.monotonic()
    subprocess.run([*command, "-c", str(config), "--order", order, *resume], check=True)
    print(f"{order}: {time.monotonic() - started:.0f} s with the start of Python", flush=True)


def _report(out: Path, order: str) -> Mapping[str, Any] | None:
    path = out / f"{order}.report.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


if __name__ == "__main__":
    main()
