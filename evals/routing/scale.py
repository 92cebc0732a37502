"""How cost grows with questions and experts, and whether the targets of speed and memory hold. Synthetic but the first.

Times are CPU milliseconds of one thread, which a busy machine lengthens less than the clock on the wall.
"""

import asyncio
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import typer

from routers.learned import MODELS
from routers.learned.artefact import Fitted, model_class, save
from routers.learned.base import Model, Training
from routers.questions import Questions
from routers.records import Array

WIDTH = 384
TASKS = 14
FIT = (10_000, 26)
LARGE = (100_000, 1_000)
LARGE_ROUTERS = ("knn", "linear", "task")
GROWTH_EXPERTS, GROWTH_QUESTIONS = (10, 30, 100, 300, 1000), (1_000, 3_000, 10_000, 30_000, 100_000)
TEXT = "A ball of mass two kilograms rolls down a slope of thirty degrees. " * 6


def world(questions: int, experts: int, seed: int = 0) -> Training:
    """Made-up answers to made-up questions: skills by task, and a direction of the embedding that makes it hard."""
    rng = np.random.default_rng(seed)
    task = rng.integers(0, TASKS, questions)
    vectors = rng.standard_normal((questions, WIDTH), np.float32)
    vectors[np.arange(questions), task] += 8
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    skill = rng.uniform(0.2, 0.8, (TASKS, experts)).astype(np.float32)
    right = rng.random((questions, experts), np.float32) < skill[task] + vectors[:, [WIDTH - 1]]
    return Training(
        questions=Questions(vectors_QW=vectors, tasks=tuple(f"t{t}" for t in task)),
        scores_QE=right.astype(np.float32),
        answers_QE=np.where(right, 0, rng.integers(1, 9, right.shape, np.int32)).astype(np.int32),
        costs_E=rng.uniform(0.1, 10, experts),
    )


def cpu_ms(work: Callable[[], object], times: int) -> Array:
    found = []
    for _ in range(times):
        started = time.process_time()
        work()
        found.append((time.process_time() - started) * 1e3)
    return np.array(found)


def _percentiles(times: Array) -> dict[str, float]:
    return {"p50_ms": float(np.percentile(times, 50)), "p99_ms": float(np.percentile(times, 99))}


def measure_encoders(times: int = 300) -> list[dict[str, Any]]:
    """One question of 64 tokens, tokenising included, on one thread; every runtime that is installed."""
    from experts.errors import ConfigError
    from routers.encoders import MiniLM, _load
    from routers.runtimes import PACKAGES
    from routers.static import WordLlama

    rows: list[dict[str, Any]] = []
    static, loop = WordLlama(), asyncio.new_event_loop()
    # Not asyncio.run: what it does about Ctrl-C writes the vectors out as text, ten times the encoder's own time.
    wait = loop.run_until_complete
    found: dict[str, Callable[[list[str]], object]] = {"wordllama": lambda texts: wait(static.encode(texts))}
    counts: dict[str, Callable[[list[str]], int]] = {"wordllama": lambda texts: wait(static.count_tokens(texts))}
    for name in PACKAGES:
        try:
            encoder = MiniLM(runtime=name)
        except ConfigError:
            continue
        runtime = _load(name, encoder._folder, encoder.width, 1)
        found[f"all-minilm-l6-v2 {name}"] = runtime.embed
        counts[f"all-minilm-l6-v2 {name}"] = runtime.count
    for name, encode in found.items():
        texts = [_of_tokens(counts[name], 64)]
        encode(texts)
        rows.append({"encoder": name, **_percentiles(cpu_ms(partial(encode, texts), times))})
    loop.close()
    return rows


def _of_tokens(count: Callable[[list[str]], int], tokens: int) -> str:
    words = TEXT.split()
    return next(" ".join(words[:n]) for n in range(10, len(words)) if count([" ".join(words[:n])]) >= tokens)


def measure_fits(names: Sequence[str], folder: Path, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Each router on 10,000 questions x 26 experts: fit, artefact, one decision, and many from given embeddings."""
    training = world(*FIT)
    one, many = training.questions.take(np.array([7])), training.questions.take(np.arange(min(5_000, FIT[0])))
    rows = []
    for name in names:
        tell(name)
        started = time.process_time()
        model = model_class(name).fit(training)
        fit_s = time.process_time() - started
        model.predict(one)
        rows.append(
            {
                "router": name,
                "fit_s": fit_s,
                "artefact_mb": _megabytes(name, model, folder / name),
                **_percentiles(cpu_ms(partial(model.predict, one), 200)),
                "decisions_per_s": len(many) / float(cpu_ms(partial(model.predict, many), 1)[0]) * 1e3,
            }
        )
    return rows


def _megabytes(name: str, model: Model, folder: Path) -> float:
    ids = tuple(f"e{e}" for e in range(FIT[1]))
    save(
        Fitted(
            name=name,
            model=model,
            expert_ids=ids,
            pool="synthetic",
            pool_digest="",
            encoder="none",
            width=WIDTH,
            questions=FIT[0],
            seed=0,
        ),
        folder,
    )
    return sum(f.stat().st_size for f in folder.iterdir()) / 1e6


def measure_large(tell: Callable[[str], None]) -> dict[str, Any]:
    """1,000 experts x 100,000 questions."""
    training = world(*LARGE)
    one = training.questions.take(np.array([7]))
    rows = []
    for name in LARGE_ROUTERS:
        tell(f"{name}, {LARGE[1]} experts")
        model = _fixed(name, training)
        model.predict(one)
        rows.append({"router": name, **_percentiles(cpu_ms(partial(model.predict, one), 60))})
        del model
    return {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "routers": rows}


def measure_growth(tell: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Milliseconds of a decision, as experts (of 10,000 questions) and as questions (of 26 experts) grow."""
    found: dict[str, list[dict[str, Any]]] = {"experts": [], "questions": []}
    sizes = [("experts", FIT[0], e) for e in GROWTH_EXPERTS] + [("questions", q, FIT[1]) for q in GROWTH_QUESTIONS]
    for axis, questions, experts in sizes:
        tell(f"{questions} questions x {experts} experts")
        training = world(questions, experts)
        one = training.questions.take(np.array([7]))
        for name in LARGE_ROUTERS:
            started = time.process_time()
            model = _fixed(name, training)
            fit_s = time.process_time() - started
            model.predict(one)
            times = _percentiles(cpu_ms(partial(model.predict, one), 40))
            found[axis].append(
                {"router": name, "size": experts if axis == "experts" else questions, "fit_s": fit_s, **times}
            )
    return found


def _fixed(name: str, training: Training) -> Model:
    """Without tuning, which fits many times over and grows alike."""
    from routers.learned.knn import Knn
    from routers.learned.linear import Linear
    from routers.learned.task import Task

    makers: dict[str, Callable[[], Model]] = {
        "knn": lambda: Knn.fit_with(training, (50, 10.0, 0.0)),
        "linear": lambda: Linear.fit_with(training, 3000.0),
        "task": lambda: Task.fit_with(training, 30.0),
    }
    return makers[name]()


def main(
    router: Annotated[str, typer.Option(help="Routers whose fit is timed, comma-separated, or 'all'.")] = "all",
    out: Annotated[Path, typer.Option(help="Folder for scale.json and scale.png.")] = Path("scale-report"),
) -> None:
    """Print and plot how the routers' cost grows, against the targets of docs/routers.md."""
    out.mkdir(parents=True, exist_ok=True)
    # The largest first: what is freed afterwards would count in its peak.
    found: dict[str, Any] = {"large": measure_large(print), "encoders": measure_encoders()}
    found["fits"] = measure_fits(list(MODELS) if router == "all" else router.split(","), out / "artefacts", print)
    found["growth"] = measure_growth(print)
    (out / "scale.json").write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    draw(found["growth"], out / "scale.png")
    for title in ("encoders", "fits"):
        _print(title, found[title])
    _print(
        f"{LARGE[1]} experts x {LARGE[0]} questions, peak {found['large']['peak_gb']:.2f} GB", found["large"]["routers"]
    )


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], title=title, box=None)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


def draw(growth: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (axis, rows) in zip(figure.subplots(1, 2), growth.items(), strict=True):
        for name in LARGE_ROUTERS:
            own = [r for r in rows if r["router"] == name]
            axes.loglog([r["size"] for r in own], [r["p50_ms"] for r in own], marker="o", markersize=3, label=name)
        axes.set_xlabel(axis)
        axes.set_ylabel("milliseconds a decision, p50")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    typer.run(main)
