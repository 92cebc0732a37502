"""Rewards from a vLLM engine of their own in this process: a sequence-classification checkpoint by its pooling runner,
or a language model by how likely it finds an answer.

The engine starts with the first request and ends with aclose().
"""

import asyncio
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experts.base import Score
from experts.errors import BadRequest, ConfigError, ExpertFailed
from experts.types import Completion, EngineSpec, Request

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_TEMPLATE = "{prompt}\n{answer}"
_MAX_ANSWERS = 64
_MAX_CHARS = 100_000
"""Of the prompt, and of each answer."""


class _Engine:
    """One AsyncLLM; whoever comes first starts it, the others wait."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._start: asyncio.Task[AsyncLLM] | None = None

    async def running(self) -> "AsyncLLM":
        last = self._start
        if last is None or (last.done() and (last.cancelled() or last.exception() or last.result().errored)):
            self._start = asyncio.create_task(self._launch())
        assert self._start is not None  # noqa: S101
        return await asyncio.shield(self._start)

    async def _launch(self) -> "AsyncLLM":
        from experts.vllm_start import launch

        return (await asyncio.to_thread(launch, self._spec))[0]

    async def aclose(self) -> None:
        start, self._start = self._start, None
        if start is None:
            return
        await asyncio.wait([start])
        if not start.cancelled() and start.exception() is None:
            from experts.vllm_server import end

            await end(start.result())


class VllmReward:
    """Any checkpoint that vLLM's pooling runner classifies with. The reward is the logit of class ``label``.

    ``template`` is what is read where the tokenizer has no chat template. What is longer than the model's context is
    cut at its start. All other options are the engine's.
    """

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        self.name = f"vllm:{model}"
        self._label, self._template = options.get("label", 0), options.get("template", _TEMPLATE)
        if not isinstance(self._label, int) or self._label < 0 or not isinstance(self._template, str):
            raise ConfigError(f"Reward '{self.name}': 'label' is a class's number, 'template' a text.")
        own = {key: value for key, value in options.items() if key not in ("label", "template")}
        spec = EngineSpec(engine_id=self.name, backend="vllm", model=model, options={"runner": "pooling", **own})
        self._engine = _Engine(spec)

    async def score(self, request: Request, answers: Sequence[Completion]) -> list[Score]:
        if not answers:
            return []
        texts = _texts(answers, self.name)
        llm = await self._engine.running()
        question = request.question[-_MAX_CHARS:]
        ids = [await asyncio.to_thread(self._tokens, llm, question, text) for text in texts]
        values = await asyncio.gather(*(self._classify(llm, each) for each in ids))
        return _scores(values, self.name)

    async def aclose(self) -> None:
        await self._engine.aclose()

    def _tokens(self, llm: "AsyncLLM", prompt: str, answer: str) -> list[int]:
        tokenizer: Any = llm.renderer.get_tokenizer()
        if getattr(tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(self._template.replace("{prompt}", prompt).replace("{answer}", answer))["input_ids"]
        return list(ids)[-llm.model_config.max_model_len :]

    async def _classify(self, llm: "AsyncLLM", ids: list[int]) -> float:
        from vllm import PoolingParams

        found = None
        params = PoolingParams(task="classify", use_activation=False)
        try:
            async for output in llm.encode({"prompt_token_ids": ids}, params, f"reward-{uuid.uuid4().hex}"):
                found = output.outputs.data
        except Exception as exc:
            raise ExpertFailed(f"Reward '{self.name}': vLLM refuses or broke: {exc}") from exc
        logits = [] if found is None else found.float().flatten().tolist()
        if self._label >= len(logits):
            raise ConfigError(f"Reward '{self.name}' has {len(logits)} classes, and no class {self._label}.")
        return float(logits[self._label])


class VllmLikelihood:
    """How likely a language model finds an answer: the mean log-probability of its tokens after the prompt, in nats."""

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        self.name = f"likelihood:{model}"
        self._engine = _Engine(EngineSpec(engine_id=self.name, backend="vllm", model=model, options=options))

    async def score(self, request: Request, answers: Sequence[Completion]) -> list[Score]:
        if not answers:
            return []
        texts = _texts(answers, self.name)
        llm = await self._engine.running()
        question = request.question[-_MAX_CHARS:]
        return _scores(await asyncio.gather(*(log_likelihood(llm, question, text) for text in texts)), self.name)

    async def aclose(self) -> None:
        await self._engine.aclose()


async def log_likelihood(llm: "AsyncLLM", prompt: str, answer: str) -> float:
    """The mean over the answer's tokens; an answer without a token is as unlikely as can be told apart: -100.

    ``llm`` generates. Together they may be as long as its context less one token; the answer's end is cut first.
    """
    from vllm import SamplingParams

    tokenizer: Any = llm.renderer.get_tokenizer()
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before = tokenizer(prompt, add_special_tokens=not getattr(tokenizer, "chat_template", None))["input_ids"]
    room = llm.model_config.max_model_len - 1
    before = list(before)[-room // 2 :]
    own = list(tokenizer(answer, add_special_tokens=False)["input_ids"])[: room - len(before)]
    if not own:
        return _NEVER
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    found = None
    try:
        async for output in llm.generate({"prompt_token_ids": before + own}, params, f"likely-{uuid.uuid4().hex}"):
            found = output.prompt_logprobs or found
    except Exception as exc:
        raise ExpertFailed(f"vLLM gave no log-probabilities: {exc}") from exc
    if found is None:
        raise ExpertFailed("vLLM gave no log-probabilities.")
    rows = found[len(before) :]
    logprobs = [row[token].logprob for row, token in zip(rows, own, strict=True) if row is not None]
    return max(sum(logprobs) / len(logprobs), _NEVER)


_NEVER = -100.0


def _texts(answers: Sequence[Completion], name: str) -> list[str]:
    if len(answers) > _MAX_ANSWERS:
        raise BadRequest(f"Reward '{name}' scores at most {_MAX_ANSWERS} answers at once.")
    # Lone surrogates are nothing that a tokenizer reads.
    return [(answer.text or "")[:_MAX_CHARS].encode("utf-8", "replace").decode() for answer in answers]


def _scores(values: Sequence[float], name: str) -> list[Score]:
    if bad := [i for i, value in enumerate(values) if not math.isfinite(value)]:
        raise ExpertFailed(f"Reward '{name}' gave NaN or infinity to answer {bad[0] + 1} of {len(values)}.")
    return [Score(value=value) for value in values]
