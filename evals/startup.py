"""``python -m evals.startup``: from ``collegium ask`` to the first token, beside vLLM's own start on the same model.

vLLM's own start is a process that imports vLLM, makes an AsyncLLM with the demo's engine arguments and nothing of ours,
and asks for one token.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from experts.models import resolve

MODEL = "smollm2-135m-instruct"
BARE = """
import asyncio, sys
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=sys.argv[1], max_model_len=2048, max_num_seqs=16,
                                                       enforce_eager=True, disable_log_stats=True))
    async for _ in engine.generate("The capital of Italy is", SamplingParams(max_tokens=1), "1"):
        print("x", flush=True)
    engine.shutdown()
if __name__ == "__main__":
    asyncio.run(main())
"""


def first_byte_s(command: Sequence[str], env: dict[str, str]) -> float:
    """Seconds from the start of ``command`` to its first byte on standard output."""
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as process:
        assert process.stdout is not None  # noqa: S101
        byte = process.stdout.read(1)
        took_s = time.monotonic() - started
        process.communicate()
    if not byte:
        raise SystemExit(f"{command[0]} printed nothing (exit status {process.returncode})")
    return took_s


def main(rounds: int = 3) -> None:
    model = resolve(MODEL)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    ask = [sys.executable, "-m", "orchestrator.cli", "ask", "What is the capital of Italy?", "--expert", "generalist"]
    figures: dict[str, list[float]] = {"vLLM alone": [], "collegium ask": []}
    for _ in range(rounds):
        figures["vLLM alone"].append(first_byte_s([sys.executable, "-c", BARE, model], env))
        figures["collegium ask"].append(first_byte_s(ask, env))
    for name, seconds in figures.items():
        print(f"{name:14} first token after {min(seconds):5.1f} s at best, {max(seconds):5.1f} s at worst")
    print(f"difference of the best: {min(figures['collegium ask']) - min(figures['vLLM alone']):+.1f} s (target: +5 s)")


if __name__ == "__main__":
    main()
