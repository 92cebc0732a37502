"""Files and batches over HTTP, by the official client."""

import io
import json
import sqlite3

import httpx
import openai
import pytest
import yaml

from experts.errors import BadRequest, ConfigError, NotFound, Unavailable
from orchestrator.batches.manager import Manager
from orchestrator.batches.register import Register
from orchestrator.batches.store import Store
from tests.orchestrator.batches.batch import line
from tests.orchestrator.served import Served, fake_config, serving, wait_for

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "cancelled", "expired")


def settings(folder, sections=None, batches=None, **options):
    return fake_config({"batches": {"path": str(folder), **(batches or {})}, **(sections or {})}, **options)


def lines(count=5, **changes):
    return "".join(json.dumps(line(f"q{i}", **changes)) + "\n" for i in range(count)).encode()


@pytest.fixture
def served(tmp_path):
    with serving(settings(tmp_path / "batches")) as running:
        yield running


@pytest.fixture
def client(served: Served):
    with served.client() as client:
        yield client


def upload(client, content=None, name="in.jsonl"):
    return client.files.create(file=(name, lines() if content is None else content), purpose="batch")


def begin(client, content=None, endpoint=CHAT, **more):
    file = upload(client, content)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def ended(client, batch, within_s=10.0):
    seen = [batch]

    def check():
        seen[0] = client.batches.retrieve(batch.id)
        return seen[0].status in ENDED

    wait_for(check, within_s)
    return seen[0]


def rows(client, file_id):
    return [json.loads(row) for row in client.files.content(file_id).text.splitlines()]


def test_a_batch_from_upload_to_answers(client):
    file = upload(client)
    assert (file.object, file.filename, file.purpose, file.status) == ("file", "in.jsonl", "batch", "processed")
    assert file.bytes == len(lines())
    assert client.files.content(file.id).content == lines()
    batch = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"for": "tests"}
    )
    assert (batch.object, batch.endpoint, batch.input_file_id, batch.metadata) == (
        "batch",
        CHAT,
        file.id,
        {"for": "tests"},
    )
    assert batch.expires_at == batch.created_at + 24 * 3600
    done = ended(client, batch)
    assert done.status == "completed"
    assert done.request_counts.model_dump() == {"total": 5, "completed": 5, "failed": 0}
    assert done.error_file_id is None
    assert 0 < done.usage.output_tokens < done.usage.total_tokens
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert {
        r["custom_id"]: r["response"]["body"]["choices"][0]["message"]["content"]
        for r in rows(client, done.output_file_id)
    } == {f"q{i}": f"one says hello to What of q{i}?" for i in range(5)}
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"


def test_a_batchs_calls_are_counted_and_its_lines_are_no_requests(served, client):
    ended(client, begin(client))
    page = served.http.get("/metrics").text
    assert 'collegium_calls_total{expert="one",outcome="ok"} 5' in page
    assert "collegium_requests_total{" not in page


def test_bad_lines_go_to_the_error_file(client):
    content = lines(2) + b"nonsense\n" + json.dumps(line("w", model="nobody")).encode() + b"\n"
    other = {**line("c"), "url": "/v1/completions"}
    done = ended(client, begin(client, content + json.dumps(other).encode()))
    assert done.request_counts.model_dump() == {"total": 5, "completed": 2, "failed": 3}
    told = [(r["error"]["line"], r["error"]["code"]) for r in rows(client, done.error_file_id)]
    assert told == [(3, "invalid_json_line"), (4, "not_found"), (5, "invalid_url")]


def test_every_endpoint(client):
    completion = {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "two", "prompt": "Ann"},
    }
    done = ended(client, begin(client, json.dumps(completion).encode(), endpoint="/v1/completions"))
    assert rows(client, done.output_file_id)[0]["response"]["body"]["choices"][0]["text"] == "two says hello to Ann"


def test_lists_in_pages(client):
    batches = [begin(client) for _ in range(3)]
    newest = [batch.id for batch in reversed(batches)]
    assert [batch.id for batch in client.batches.list()] == newest
    page = client.batches.list(limit=2)
    assert ([batch.id for batch in page.data], page.has_more) == (newest[:2], True)
    assert [batch.id for batch in client.batches.list(limit=1, after=newest[0])] == newest[1:]
    for batch in batches:
        ended(client, batch)
    assert len(client.files.list(purpose="batch").data) == 3
    assert len(list(client.files.list(limit=2))) == 6  # and what the batches wrote
    assert [f.id for f in client.files.list(purpose="batch", order="asc")] == [b.input_file_id for b in batches]


def test_delete(client):
    file = upload(client)
    assert client.files.delete(file.id).deleted is True
    for attempt in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            attempt(file.id)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_file_id": "file-none"}, "No file"),
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_batch_that_cannot_be(served, client, given, message):
    body = {"input_file_id": upload(client).id, "endpoint": CHAT, "completion_window": "24h", **given}
    reply = served.http.post("/v1/batches", json=body)
    assert reply.status_code in (400, 404)
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=none", "order=up"])
def test_a_page_that_cannot_be(served, query):
    assert served.http.get(f"/v1/batches?{query}").status_code == 400


def test_uploads_that_cannot_be(served, client):
    post = served.http.post
    assert post("/v1/files", json={}).status_code == 400
    assert post("/v1/files", files={"file": b"x"}).status_code == 400  # no purpose
    assert post("/v1/files", files={"file": b"x"}, data={"purpose": "assistants"}).status_code == 400
    assert post("/v1/files", files={"file": b"x"}, data={"purpose": "batch", "more": "1"}).status_code == 400
    assert post("/v1/files", data={"file": "text", "purpose": "batch"}, files={"other": b"x"}).status_code == 400
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert post("/v1/files", content=b"no form at all", headers=headers).status_code == 400
    assert post("/v1/files", content=b"", headers={"content-type": "multipart/form-data"}).status_code == 400
    assert client.files.list().data == []


def test_a_file_that_is_too_large(tmp_path):
    with serving(settings(tmp_path, batches={"max_file_bytes": 100_000})) as served:
        with served.client() as client, pytest.raises(openai.APIStatusError) as refused:
            upload(client, b"x" * 300_000)
        assert refused.value.status_code == 413
        assert "at most 100000 bytes here (batches.max_file_bytes)" in str(refused.value)

        def chunks():
            yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
            for _ in range(40):
                yield b"x" * 10_000

        reply = served.http.post(
            "/v1/files", content=chunks(), headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert reply.status_code == 413
    assert list((tmp_path / "files").iterdir()) == []


def test_too_many_lines_fail_the_batch(tmp_path):
    with serving(settings(tmp_path, batches={"max_lines": 3})) as served, served.client() as client:
        done = ended(client, begin(client))
        assert done.status == "failed"
        assert "max_lines" in done.errors.data[0].message


def test_limits_on_what_is_kept(tmp_path):
    config = settings(tmp_path, batches={"max_files": 2, "max_unfinished": 1}, ttft_s=0.5)
    with serving(config) as served, served.client() as client:
        begin(client)
        file = upload(client)
        with pytest.raises(openai.RateLimitError):
            upload(client)
        with pytest.raises(openai.RateLimitError):
            client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert len(list((tmp_path / "files").iterdir())) == 2


def test_closed_without_a_folder():
    with serving(fake_config()) as served:
        for method, path in (
            ("GET", "/v1/files"),
            ("POST", "/v1/files"),
            ("POST", "/v1/batches"),
            ("GET", "/v1/batches/x"),
        ):
            reply = served.http.request(method, path)
            assert reply.status_code == 403
            assert "batches.path" in reply.json()["error"]["message"]


def test_a_tenant_sees_its_own_only(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_ANN", "a")
    monkeypatch.setenv("KEY_BOB", "b")
    keys = {"api_keys": {"ann": {"env": "KEY_ANN"}, "bob": {"env": "KEY_BOB", "models": ["two"]}}}
    with (
        serving(settings(tmp_path, {"security": keys})) as served,
        served.client("a") as ann,
        served.client("b") as bob,
    ):
        batch = ended(ann, begin(ann))
        assert [f.id for f in bob.files.list()] == []
        assert list(bob.batches.list()) == []
        for attempt in (
            lambda: bob.files.content(batch.input_file_id),
            lambda: bob.files.content(batch.output_file_id),
            lambda: bob.files.delete(batch.input_file_id),
            lambda: bob.batches.retrieve(batch.id),
            lambda: bob.batches.cancel(batch.id),
            lambda: bob.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                attempt()
        his = ended(bob, begin(bob, lines(1) + lines(1, model="two").replace(b"q0", b"p0")))
        assert (his.request_counts.completed, his.request_counts.failed) == (1, 1)
        assert rows(bob, his.error_file_id)[0]["response"]["status_code"] == 403
        assert httpx.get(f"{served.url}/v1/files").status_code == 401


def test_cancel(tmp_path):
    with serving(settings(tmp_path, batches={"window": 1}, ttft_s=0.1)) as served, served.client() as client:
        batch = begin(client, lines(200))
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 1)
        with pytest.raises(openai.BadRequestError, match="cancel it first"):
            client.files.delete(batch.input_file_id)
        assert client.batches.retrieve(batch.id).status == "in_progress"
        assert client.batches.cancel(batch.id).status == "cancelling"
        done = ended(client, batch)
        assert done.status == "cancelled"
        assert done.cancelled_at is not None
        answered, unasked = rows(client, done.output_file_id), rows(client, done.error_file_id)
        assert len(answered) + len(unasked) == 200
        assert len(answered) == done.request_counts.completed > 1
        assert {r["error"]["code"] for r in unasked} == {"batch_cancelled"}
        wait_for(lambda: served.idle)
        with pytest.raises(openai.BadRequestError, match="nothing left"):
            client.batches.cancel(batch.id)


def test_a_batch_that_waits_for_its_turn_can_be_cancelled(tmp_path):
    with serving(settings(tmp_path, batches={"window": 1}, ttft_s=0.1)) as served, served.client() as client:
        first, second = begin(client, lines(100)), begin(client)
        assert client.batches.cancel(second.id).status == "cancelling"
        client.batches.cancel(first.id)
        assert ended(client, second).status == "cancelled"
        assert ended(client, first).status == "cancelled"


def test_the_window_closes(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.batches.endpoints.now", lambda: 1_000_000_000)
    with serving(settings(tmp_path)) as served, served.client() as client:
        done = ended(client, begin(client))
        assert done.status == "expired"
        assert {r["error"]["code"] for r in rows(client, done.error_file_id)} == {"batch_expired"}


def test_the_service_stops_and_goes_on(tmp_path):
    config = settings(tmp_path, batches={"window": 1}, ttft_s=0.05)
    with serving(config) as served, served.client() as client:
        batch = begin(client, lines(30))
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 3)
    with serving(config) as served, served.client() as client:
        done = ended(client, batch)
        assert (done.status, done.request_counts.completed) == ("completed", 30)
        assert len({r["custom_id"] for r in rows(client, done.output_file_id)}) == 30
        assert served.engine.calls < 30  # what was answered before is not asked again


class _Kill(BaseException):
    """No bug, which would end the batch."""


def _killed(*_):
    raise _Kill


def test_killed_between_the_output_and_the_register(tmp_path, monkeypatch):
    config = settings(tmp_path)
    with monkeypatch.context() as patch, serving(config) as served, served.client() as client:
        patch.setattr(Manager, "_complete", _killed)
        batch = begin(client)
        wait_for(lambda: list((tmp_path / "batches" / batch.id).glob("output.report.json")))
        wait_for(lambda: served.idle)
    with serving(config) as served, served.client() as client:
        done = ended(client, batch)
        assert (done.status, done.request_counts.completed) == ("completed", 5)
        assert served.engine.calls == 0


def test_a_full_disk_holds_a_batch_up_and_loses_nothing(tmp_path, monkeypatch):
    settle, left = Store.settle, [2]

    def full(self, *given):
        if left[0]:
            left[0] -= 1
            self._db.execute("PRAGMA max_page_count = 1")
            given = (given[0], given[1], {"large": "x" * 2_000_000})
        return settle(self, *given)

    monkeypatch.setattr(Manager, "PAUSE_S", 0.05)
    monkeypatch.setattr(Store, "settle", full)
    with serving(settings(tmp_path)) as served, served.client() as client:
        done = ended(client, begin(client))
        assert (done.status, done.request_counts.completed) == ("completed", 5)
        assert left == [0]


def test_a_bug_ends_a_batch_and_keeps_its_answers(tmp_path, monkeypatch, caplog):
    settle, calls = Store.settle, []

    def broken(self, *given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("a bug")
        return settle(self, *given)

    monkeypatch.setattr(Store, "settle", broken)
    with serving(settings(tmp_path, batches={"window": 1})) as served, served.client() as client:
        done = ended(client, begin(client))
        assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("failed", 2, 3)
        assert (done.errors.data[0].code, done.failed_at is not None) == ("internal_error", True)
        assert [row["custom_id"] for row in rows(client, done.output_file_id)] == ["q0", "q1"]
        assert {row["error"]["code"] for row in rows(client, done.error_file_id)} == {"internal_error"}
        assert ended(client, begin(client)).status == "completed"  # the next one has its turn
    assert "stopped by a bug" in caplog.text


@pytest.mark.parametrize("then", [KeyError("a bug"), ConfigError("a file that cannot be written")])
def test_a_bug_and_no_end_either_is_a_failed_batch_whose_folder_stays(tmp_path, monkeypatch, then):
    failures = iter([KeyError("a bug"), then])

    def broken(self):
        raise next(failures)

    monkeypatch.setattr("orchestrator.batches.runner.Runner._unread", broken)
    with serving(settings(tmp_path)) as served, served.client() as client:
        done = ended(client, begin(client))
        assert (done.status, done.errors.data[0].code, done.output_file_id) == (
            "failed",
            getattr(then, "code", "internal_error"),
            None,
        )
        assert any(path.is_dir() for path in tmp_path.rglob(done.id))


def test_a_reload_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_ADMIN", "secret")
    path, admin = tmp_path / "collegium.yaml", {"security": {"admin_key_env": "KEY_ADMIN"}}
    config = settings(tmp_path / "batches", admin, batches={"window": 1}, ttft_s=0.05)
    path.write_text(yaml.safe_dump(config))
    with serving(config, config_path=path) as served, served.client() as client:
        batch = begin(client, lines(20))
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 2)
        config["engines"]["a"]["options"]["text"] = "new words"
        path.write_text(yaml.safe_dump(config))
        reply = served.http.post("/admin/reload", headers={"authorization": "Bearer secret"})
        assert reply.status_code == 200
        done = ended(client, batch)
        assert (done.status, done.request_counts.completed) == ("completed", 20)
        texts = [r["response"]["body"]["choices"][0]["message"]["content"] for r in rows(client, done.output_file_id)]
        assert texts[-1] == "new words"
        assert "says hello" in texts[0]


def test_a_reload_that_takes_an_expert_away(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_ADMIN", "secret")
    path, b = tmp_path / "collegium.yaml", {"backend": "fake", "options": {"ttft_s": 0.05, "load_s": 0.2}}
    config = settings(tmp_path / "batches", {"security": {"admin_key_env": "KEY_ADMIN"}}, batches={"window": 1})
    config["engines"]["b"], config["experts"]["two"] = b, {"engine": "b"}
    config["policies"] = {"default": {"router": "round_robin"}}
    path.write_text(yaml.safe_dump(config))
    with serving(config, config_path=path) as served, served.client() as client:
        batch = begin(client, lines(20))
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 10)
        del config["engines"]["b"], config["experts"]["two"]
        path.write_text(yaml.safe_dump(config))
        reply = served.http.post("/admin/reload", headers={"authorization": "Bearer secret"})
        assert reply.status_code == 200
        done = ended(client, batch)
        assert (done.status, done.request_counts.completed) == ("completed", 20)
        assert rows(client, done.output_file_id)[-1]["response"]["body"]["model"] == "one"


def test_an_engine_that_is_gone_at_the_next_start(tmp_path):
    config = settings(tmp_path, batches={"window": 1}, ttft_s=0.05)
    with serving(config) as served, served.client() as client:
        batch = begin(client, lines(20))
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 2)
    config["engines"] = {"b": {"backend": "fake"}}
    config["experts"] = {"other": {"engine": "b"}}
    with serving(config) as served, served.client() as client:
        done = ended(client, batch)
        assert (done.status, done.request_counts.total) == ("completed", 20)
        failed = rows(client, done.error_file_id)
        assert {row["error"]["code"] for row in failed} == {"expert_failed"}
        assert "taken out of the config" in failed[0]["error"]["message"]


def test_two_services_on_one_folder(tmp_path):
    with serving(settings(tmp_path)) as served, served.client() as client:
        (tmp_path / "files" / "under-way.part").touch()
        with pytest.raises(ConfigError, match="another service"):
            Register(tmp_path)
        assert ended(client, begin(client)).status == "completed"
    Register(tmp_path).close()
    assert not list((tmp_path / "files").glob("*.part"))  # of an upload that a kill cut off


def test_a_batch_that_ends_while_it_is_cancelled_has_ended(tmp_path):
    register = Register(tmp_path)
    batch = register.add_batch(None, {"input_file_id": "f"}, most=1)
    assert register.cancel(batch.batch_id, None)[1]
    assert not register.cancel(batch.batch_id, None)[1]
    register.change(batch.batch_id, "completed", {})
    with pytest.raises(BadRequest, match="nothing left"):
        register.cancel(batch.batch_id, None)
    with pytest.raises(NotFound):
        register.cancel(batch.batch_id, "another")
    assert register.unfinished() == []
    register.close()


@pytest.mark.parametrize("metadata", [{"k" * 65: "v"}, {"k": "v" * 513}, {str(i): "" for i in range(17)}])
def test_metadata_is_limited(client, metadata):
    with pytest.raises(openai.BadRequestError, match="metadata"):
        begin(client, metadata=metadata)


def test_a_file_object_streams(client):
    file = client.files.create(file=io.BytesIO(lines(2)), purpose="batch")
    assert client.files.retrieve(file.id).bytes == len(lines(2))


def test_a_full_disk_at_its_beginning_and_at_its_end(tmp_path, monkeypatch):
    left = [1, 1]
    connect, change = sqlite3.connect, Register.change

    def full_at_first(path, **settings):
        db = connect(path, **settings)
        if path.name == "state.sqlite" and left[0]:
            left[0] = 0
            db.execute("PRAGMA max_page_count = 1")
        return db

    def full_at_last(self, *given):
        if left[1]:
            left[1] = 0
            raise Unavailable("database or disk is full")
        change(self, *given)

    monkeypatch.setattr(Manager, "PAUSE_S", 0.05)
    monkeypatch.setattr(sqlite3, "connect", full_at_first)
    monkeypatch.setattr(Register, "change", full_at_last)
    with serving(settings(tmp_path)) as served, served.client() as client:
        done = ended(client, begin(client))
        assert (done.status, done.request_counts.completed) == ("completed", 5)
        assert left == [0, 0]
