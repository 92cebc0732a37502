"""The official client, a batch, two real engines and one slot."""

import json
from typing import Any

import pytest

from tests.orchestrator.batches.batch import line
from tests.orchestrator.batches.test_batches_http import CHAT, begin, ended, rows, upload
from tests.orchestrator.served import serving, wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OPTIONS = {"max_model_len": 256, "max_num_seqs": 4, "kv_cache_memory_bytes": 2**28}
ENGINE = {"backend": "vllm", "model": "smollm2-135m-instruct", "options": OPTIONS}
FRANCE = "What is the capital of France?"


def test_a_batch_by_the_official_client_on_real_engines(tmp_path: Any) -> None:
    config = {
        "engines": {"a": ENGINE, "b": ENGINE},
        "experts": {"A": {"engine": "a"}, "B": {"engine": "b"}},
        "policies": {"default": {"router": "round_robin"}},
        "residency": {"slots": 1},
        "batches": {"path": str(tmp_path / "batches")},
    }
    lines = (line(f"q{i}", text=FRANCE, max_tokens=16, temperature=0) for i in range(6))
    content = "".join(json.dumps(each) + "\n" for each in lines).encode()
    with serving(config, ready=False) as served:
        wait_for(lambda: served.app.state.host.ready, within_s=300)
        with served.client(timeout=300) as client:
            batch = begin(client, content)
            done = ended(client, batch, within_s=300)
            assert (done.status, done.request_counts.completed) == ("completed", 6)
            answers = {
                r["custom_id"]: r["response"]["body"]["choices"][0]["message"]["content"]
                for r in rows(client, done.output_file_id)
            }
            assert sorted(answers) == [f"q{i}" for i in range(6)]
            assert all("Paris" in text for text in answers.values())
            loads = {e: s.loads for e, s in served.service.dispatcher.snapshot().items()}
            assert loads == {"a": 1, "b": 1}, "once each, though lines alternate"
            online = client.chat.completions.create(
                model="B", messages=[{"role": "user", "content": FRANCE}], max_tokens=16, temperature=0
            )
            assert "Paris" in online.choices[0].message.content
            other = client.batches.create(
                input_file_id=upload(client, content).id, endpoint=CHAT, completion_window="24h"
            )
            client.batches.cancel(other.id)
            assert ended(client, other, within_s=300).status == "cancelled"
            assert [b.id for b in client.batches.list()] == [other.id, batch.id]
