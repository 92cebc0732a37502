"""Rewards from real vLLM engines: a small checkpoint with a classifier's head, and SmolLM2's own likelihood."""

from pathlib import Path

import pytest

from experts.errors import BadRequest, ConfigError
from experts.models import resolve
from experts.reward_vllm import VllmLikelihood, VllmReward, _texts, log_likelihood
from experts.types import Completion, Message, Request
from experts.vllm import VllmEngine

ASKED = Request(messages=(Message(role="user", content="What is the capital of France?"),))


def answers(*texts: str) -> list[Completion]:
    return [Completion(request_id="r", expert_id=f"e{i}", text=text) for i, text in enumerate(texts)]


async def test_nothing_is_started_for_nothing() -> None:
    reward = VllmReward("nowhere", {})
    assert await reward.score(ASKED, []) == []
    with pytest.raises(BadRequest, match="at most 64"):
        await reward.score(ASKED, answers(*"x" * 65))
    await reward.aclose()
    assert await VllmLikelihood("nowhere", {}).score(ASKED, []) == []


def test_lone_surrogates_do_not_reach_the_tokenizer() -> None:
    assert _texts(answers("Paris \ud800"), "any") == ["Paris ?"]


@pytest.mark.parametrize("options", [{"label": "0"}, {"label": -1}, {"template": 3}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="label"):
        VllmReward("nowhere", options)


@pytest.mark.vllm
@pytest.mark.asyncio(loop_scope="session")
async def test_smollm2_finds_the_truth_likelier(vllm_engine: VllmEngine) -> None:
    llm = (await vllm_engine._running()).llm
    true, false, empty, long = [
        await log_likelihood(llm, ASKED.question, text)
        for text in ("The capital of France is Paris.", "Purple hovercraft eels twelve of.", "", "Paris " * 2000)
    ]
    assert -1 < true < 0
    assert false < true - 2
    assert empty == -100
    assert -100 < long < 0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with two classes, random, saved as any checkpoint is."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        num_labels=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.vllm
@pytest.mark.asyncio(loop_scope="session")
async def test_a_classifier_checkpoint_gives_the_logits_it_gives_without_vllm(classifier: Path) -> None:
    options = {"label": 1, "dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": 2**26}
    reward = VllmReward(str(classifier), options)
    texts = ("Paris.", "I do not know.", "")
    try:
        found = [score.value for score in await reward.score(ASKED, answers(*texts))]
        long = await reward.score(ASKED, answers("word " * 5000))
    finally:
        await reward.aclose()
    assert found == pytest.approx([_logit(classifier, text) for text in texts], abs=2e-3)
    assert len(long) == 1


def _logit(folder: Path, text: str) -> float:
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    chat = [{"role": "user", "content": ASKED.question}, {"role": "assistant", "content": text}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return float(model(**ids).logits[0, 1])
