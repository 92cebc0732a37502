"""The service's batches: each waits for its turn, runs, and goes on where it was when the service comes back."""

import asyncio
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from experts.errors import CollegiumError, Unavailable
from orchestrator.batches.lines import Reader
from orchestrator.batches.register import Register, Status, StoredBatch, StoredFile, now
from orchestrator.batches.runner import Runner, report_path
from orchestrator.batches.session import Job, Progress
from orchestrator.batches.work import Bench
from orchestrator.config import Batches
from orchestrator.host import Host
from orchestrator.resilience import is_cancelled

log = logging.getLogger(__name__)

CANCELLED = "batch_cancelled", "The batch was cancelled before this line was answered."
EXPIRED = "batch_expired", "The batch's completion window closed before this line was answered."
BROKEN = "internal_error", "A bug in the service ended this batch; the service's log has it. Answers so far are kept."


class Manager:
    """start() in the running loop; close() leaves what is not done for the next start()."""

    PAUSE_S = 30.0
    """Between two tries of a batch that the disk stopped."""

    def __init__(self, host: Host, register: Register, settings: Batches) -> None:
        self._host = host
        self._register = register
        self._settings = settings
        self._turns: asyncio.Queue[StoredBatch] = asyncio.Queue()
        self._workers: list[asyncio.Task[None]] = []
        self._tasks: dict[str, asyncio.Task[Mapping[str, Any]]] = {}
        self._progress: dict[str, Progress] = {}
        self._since: dict[str, dict[str, int]] = {}
        self._cancelled: set[str] = set()

    async def start(self) -> None:
        for batch in await asyncio.to_thread(self._register.unfinished):
            if batch.status == "cancelling":
                self._cancelled.add(batch.batch_id)
            self.submit(batch)
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._settings.at_a_time)]

    async def close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    def submit(self, batch: StoredBatch) -> None:
        self._turns.put_nowait(batch)

    def cancel(self, batch: StoredBatch) -> None:
        """Its calls end; what is answered is kept. Nothing happens to one that is being written already."""
        self._cancelled.add(batch.batch_id)
        progress, task = self._progress.get(batch.batch_id), self._tasks.get(batch.batch_id)
        if task is not None and (progress is None or progress.stage != "writing"):
            task.cancel()

    def body(self, batch: StoredBatch) -> dict[str, Any]:
        """OpenAI's batch object, as of now."""
        body = {"id": batch.batch_id, "object": "batch", **batch.body, "status": batch.status}
        progress = self._progress.get(batch.batch_id)
        if progress is None or batch.status not in ("validating", "cancelling"):
            return body
        tally = progress.tally
        done = tally.settled - tally.failed
        counts = {"total": tally.requests, "completed": done, "failed": tally.failed}
        status = batch.status if batch.status == "cancelling" else _STATUS[progress.stage]
        return {**body, "status": status, "request_counts": counts, **self._since.get(batch.batch_id, {})}

    async def _work(self) -> None:
        while True:
            batch = await self._turns.get()
            try:
                await self._finish(batch)
            except Exception:
                log.exception("batch %s stopped by a bug", batch.batch_id)
            finally:
                for known in (self._tasks, self._progress, self._since):
                    known.pop(batch.batch_id, None)
                self._cancelled.discard(batch.batch_id)

    async def _finish(self, batch: StoredBatch) -> None:
        """From wherever it stands to its end."""
        code: tuple[str, str] | None = None
        while True:
            try:
                await self._settle(batch, code)
                return
            except TimeoutError:
                code = EXPIRED
            except (Unavailable, OSError) as exc:
                log.error("batch %s waits %.0f s: %s", batch.batch_id, self.PAUSE_S, exc)
                await asyncio.sleep(self.PAUSE_S)
            except asyncio.CancelledError:
                if is_cancelled():
                    raise
                code = CANCELLED
            except Exception:
                log.exception("batch %s stopped by a bug", batch.batch_id)
                if code is BROKEN:  # it cannot even be ended; its folder stays for whoever looks into it
                    await asyncio.to_thread(self._give_up, batch, CollegiumError(BROKEN[1]))
                    return
                code = BROKEN

    async def _settle(self, batch: StoredBatch, code: tuple[str, str] | None) -> None:
        """To its end, unless it waits for the disk, is cancelled or expires."""
        try:
            report = await self._attempt(batch, code)
        except Unavailable:
            raise
        except CollegiumError as exc:
            # Of one that a bug has ended the answers so far are promised: its folder stays.
            await asyncio.to_thread(self._give_up if code is BROKEN else self._fail, batch, exc)
        else:
            await asyncio.to_thread(self._complete, batch, report, code)

    async def _attempt(self, batch: StoredBatch, code: tuple[str, str] | None) -> Mapping[str, Any]:
        """The report. Raises TimeoutError when its window closes, CancelledError when its owner cancels it."""
        job = await asyncio.to_thread(self._job, batch)
        if (report := await asyncio.to_thread(_report, job)) is not None:
            return report  # the service ended between the output and the register
        if code is None and batch.batch_id in self._cancelled:
            raise asyncio.CancelledError
        runner = Runner(job, lambda: self._bench(batch), watch=lambda progress: self._watch(batch.batch_id, progress))
        task = asyncio.create_task(runner.run() if code is None else runner.end(*code))
        self._tasks[batch.batch_id] = task
        try:
            left_s = None if code else max(0.0, batch.body["expires_at"] - now())
            done, _ = await asyncio.wait([task], timeout=left_s)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        if not done:
            raise TimeoutError
        return task.result()

    def _job(self, batch: StoredBatch) -> Job:
        folder = self._register.folder / "batches" / batch.batch_id
        folder.mkdir(exist_ok=True)
        return Job(
            source=self._register.file(batch.body["input_file_id"], batch.tenant).path,
            output=folder / "output.jsonl",
            errors=folder / "errors.jsonl",
            state=folder / "state.sqlite",
            window=self._settings.window,
            max_lines=self._settings.max_lines,
        )

    def _bench(self, batch: StoredBatch) -> Bench:
        """Of the service of the moment: a reload may have come."""
        service = self._host.service
        tenant = service.keys.named(batch.tenant)
        reader = Reader(service, tenant=tenant, url=batch.body["endpoint"])
        return Bench(service=service, reader=reader)

    def _watch(self, batch_id: str, progress: Progress) -> None:
        self._progress[batch_id] = progress
        since = self._since.setdefault(batch_id, {})
        if progress.stage != "reading":
            since.setdefault("in_progress_at", now())
        if progress.stage == "writing":
            since.setdefault("finalizing_at", now())

    def _complete(self, batch: StoredBatch, report: Mapping[str, Any], code: tuple[str, str] | None) -> None:
        job = self._job(batch)
        made = {"output_file_id": ("output", job.output), "error_file_id": ("error", job.errors)}
        files = {key: self._file(batch, *what) for key, what in made.items() if what[1].exists()}
        status = _ENDS[code]
        failed = report["errors"]
        changes = {
            **self._since.get(batch.batch_id, {}),
            "errors": None if code is not BROKEN else _errors(CollegiumError(BROKEN[1])),
            **{key: file.file_id for key, file in files.items()},
            f"{status}_at": now(),
            "request_counts": {"total": report["requests"], "completed": report["requests"] - failed, "failed": failed},
            "usage": _usage(report),
        }
        self._register.change(batch.batch_id, status, changes, list(files.values()))

    def _file(self, batch: StoredBatch, kind: str, path: Path) -> StoredFile:
        return StoredFile(
            # Of the batch: found again after a crash, it is the same file.
            file_id=f"file-{kind}-{batch.batch_id.removeprefix('batch_')}",
            tenant=batch.tenant,
            purpose="batch_output",
            name=f"{batch.batch_id}_{kind}.jsonl",
            size_bytes=path.stat().st_size,
            created_at=now(),
            path=path,
        )

    def _give_up(self, batch: StoredBatch, exc: CollegiumError) -> None:
        log.warning("batch %s failed: %s", batch.batch_id, exc.message)
        self._register.change(batch.batch_id, "failed", {"failed_at": now(), "errors": _errors(exc)})

    def _fail(self, batch: StoredBatch, exc: CollegiumError) -> None:
        self._give_up(batch, exc)
        shutil.rmtree(self._register.folder / "batches" / batch.batch_id, ignore_errors=True)


_STATUS: Mapping[str, Status] = {
    "reading": "validating",
    "answering": "in_progress",
    "combining": "in_progress",
    "writing": "finalizing",
}

_ENDS: Mapping[tuple[str, str] | None, Status] = {
    None: "completed",
    CANCELLED: "cancelled",
    EXPIRED: "expired",
    BROKEN: "failed",
}


def _usage(report: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's usage of a batch: of all calls of experts."""
    read, written = report["prompt_tokens"], report["completion_tokens"]
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }


def _errors(exc: CollegiumError) -> dict[str, Any]:
    """OpenAI's list of what a batch failed for."""
    error = {"code": exc.code, "message": exc.message, "param": exc.param, "line": None}
    return {"object": "list", "data": [error]}


def _report(job: Job) -> Mapping[str, Any] | None:
    """That of a batch whose output lies there already. Its state is removed after its report is written."""
    path = report_path(job.output)
    return dict(orjson.loads(path.read_bytes())) if path.exists() and not job.state.exists() else None
