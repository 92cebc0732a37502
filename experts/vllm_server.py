"""A running vLLM, asked through its own OpenAI server classes. Importing this imports vLLM: only vllm_start.py does,
in the environment that vLLM needs."""

import asyncio
import copy
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import orjson
from vllm.entrypoints.chat_utils import load_chat_template
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.renderers.inputs.preprocess import extract_prompt_len
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM

from experts.errors import CollegiumError, ConfigError, ContextLengthExceeded
from experts.types import ExpertSpec, Request
from experts.vllm_options import Options
from experts.wire import read_error, request_body

_BASE = "(base)"
"""What vLLM is told the model without an adapter is called. No adapter can have this name."""
_UNBOUNDED = 2**31
_END_S = 5.0
"""Then vLLM's process is killed."""

Asked = ChatCompletionRequest | CompletionRequest


class Server:
    def __init__(self, *, engine_id: str, llm: AsyncLLM, adapters: Mapping[str, str]) -> None:
        """``llm`` belongs to the server from here on. Call open() before anything else."""
        self.llm = llm
        self._engine_id = engine_id
        self._adapters = adapters
        self._level = 0
        self._chat: OpenAIServingChat
        self._completion: OpenAIServingCompletion

    async def open(self, options: Options) -> None:
        """Load the adapters and warm up the chat template. Raises ConfigError for an adapter that does not fit."""
        paths = [LoRAModulePath(name, folder) for name, folder in self._adapters.items()]
        models = OpenAIServingModels(self.llm, [BaseModelPath(_BASE, self.llm.model_config.model)], lora_modules=paths)
        try:
            await models.init_static_loras()  # type: ignore[no-untyped-call]
        except ValueError as exc:
            raise ConfigError(f"Engine '{self._engine_id}': cannot use an adapter: {exc}") from exc
        templating = _templating(self.llm, options.serving)
        renderer = OnlineRenderer(self.llm.model_config, self.llm.renderer, **templating)
        await asyncio.to_thread(renderer.warmup)
        self._chat = OpenAIServingChat(self.llm, models, "assistant", online_renderer=renderer, **templating)
        self._completion = OpenAIServingCompletion(self.llm, models, online_renderer=renderer, request_logger=None)

    @property
    def dead(self) -> bool:
        return self.llm.errored

    async def aclose(self) -> None:
        """End vLLM's processes. What is being generated fails."""
        await end(self.llm)

    async def sleep(self, level: int) -> bool:
        """False where vLLM was not started for it, and at level 2 with adapters: their weights would be gone, and
        vLLM reads only the model's again."""
        if not self.llm.model_config.enable_sleep_mode or (level > 1 and self._adapters):
            return False
        await self.llm.sleep(level)
        self._level = level
        return True

    async def wake(self) -> None:
        """Nothing to do for one that does not sleep."""
        level, self._level = self._level, 0
        if level == 1:
            await self.llm.wake_up()
        elif level == 2:
            # The weights' memory first, so that there is room to read them; only then the KV cache's.
            await self.llm.wake_up(["weights"])
            await self.llm.collective_rpc("reload_weights")
            await self.llm.wake_up(["kv_cache"])

    async def events(self, request: Request, expert: ExpertSpec) -> AsyncGenerator[Mapping[str, Any], None]:
        """The events of the streamed reply, as OpenAI's API has them. Closing it ends the generation in vLLM.

        Raises what read_error() makes of vLLM's refusal.
        """
        reply = await self._ask(request_body(request, self._model(expert)), expert)
        async with aclosing(reply) as lines:
            async for line in lines:
                if not line.startswith("data: [DONE]"):
                    yield orjson.loads(line.removeprefix("data: "))

    def _model(self, expert: ExpertSpec) -> str:
        if expert.adapter is None:
            return _BASE
        if expert.adapter not in self._adapters:
            raise ConfigError(
                f"Expert '{expert.expert_id}': its engine '{expert.engine_id}' has no adapter '{expert.adapter}', only "
                f"{', '.join(self._adapters) or 'none at all'}; name it under the engine's adapters."
            )
        return expert.adapter

    async def _ask(self, body: dict[str, Any], expert: ExpertSpec) -> AsyncGenerator[str, None]:
        asked: Asked | None = None
        cause: Exception | None = None
        reply: object
        try:
            if "prompt" in body:
                asked = CompletionRequest(**body)
                reply = await self._completion.create_completion(asked)
            else:
                asked = ChatCompletionRequest(**body)
                reply = await self._chat.create_chat_completion(asked)
        except Exception as exc:  # noqa: BLE001  # create_error_response() is vLLM's own table from any exception
            reply, cause = create_error_response(exc), exc
        if isinstance(reply, AsyncGenerator):
            return reply
        assert isinstance(reply, ErrorResponse)  # noqa: S101  # the third kind answers requests that do not stream
        raise await self._refusal(reply, asked, expert) from cause

    async def _refusal(self, reply: ErrorResponse, asked: Asked | None, expert: ExpertSpec) -> CollegiumError:
        error = read_error(reply.error.code, reply.model_dump(), expert)
        if asked is None or not isinstance(error, ContextLengthExceeded):
            return error
        # vLLM stops counting one token past its limit; the caller is told the whole length.
        return ContextLengthExceeded(
            prompt_tokens=await self._count_tokens(asked),
            context_length=self.llm.model_config.max_model_len,
            expert_id=expert.expert_id,
        )

    async def _count_tokens(self, asked: Asked) -> int:
        renderer = copy.copy(self._chat.online_renderer)
        renderer.model_config = copy.copy(renderer.model_config)
        renderer.model_config.max_model_len = _UNBOUNDED
        if isinstance(asked, CompletionRequest):
            rendered = await renderer.render_completion(asked)
        else:
            chat = await renderer.render_chat(asked)
            rendered = chat if isinstance(chat, ErrorResponse) else chat[1]
        if isinstance(rendered, ErrorResponse):
            return 0
        return sum(extract_prompt_len(self.llm.model_config, each) for each in rendered)


async def end(llm: AsyncLLM) -> None:
    """End vLLM's processes."""
    await asyncio.to_thread(_end, llm)
    # vLLM closes its sockets in this loop, and leaves their context with three threads behind.
    await asyncio.sleep(0)
    llm.engine_core.resources.ctx.destroy(linger=0)


def _end(llm: AsyncLLM) -> None:
    processes = getattr(llm.engine_core.resources.engine_manager, "processes", ())
    llm.shutdown(_END_S)
    for process in processes:
        process.join()  # or it stays a zombie


def _templating(llm: AsyncLLM, serving: Mapping[str, Any]) -> dict[str, Any]:
    """What the renderer and the chat class both want to know, by their names for it."""
    return {
        "request_logger": None,
        "chat_template": load_chat_template(serving["chat_template"]),
        "chat_template_content_format": serving["chat_template_content_format"],
        "default_chat_template_kwargs": serving["default_chat_template_kwargs"],
        "exclude_tools_when_tool_choice_none": serving["exclude_tools_when_tool_choice_none"],
        "tool_parser": serving["tool_call_parser"],
        "enable_auto_tools": serving["enable_auto_tool_choice"],
        "reasoning_parser": llm.vllm_config.structured_outputs_config.reasoning_parser,
    }
