"""Records put on a thread of its own, so that the engine never waits for the disk."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from longreach.engine.disk import DiskStore
from longreach.engine.disk_record import Payload, flat_views


@dataclass(frozen=True)
class _Job:
    tenant: str
    key: bytes
    kind: str
    buffers: Payload
    meta: dict[str, Any] | None
    nbytes: int


class BackgroundWriter:
    """A queue of records and the thread that puts them.

    At most `max_pending_bytes` wait; what does not fit is dropped and counted in `dropped`. A record that the index
    already knows is not written again; that counts as a use. The thread does not keep the process alive: `close`, then
    close the store.
    """

    def __init__(self, store: DiskStore, max_pending_bytes: int) -> None:
        self.store, self.max_pending_bytes = store, max_pending_bytes
        self.dropped = 0
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._pending_bytes = 0  # of those in the queue and the one being written
        self._is_closing = self._is_ended = False
        self._thread = threading.Thread(target=self._run, name="longreach-disk-writer", daemon=True)
        self._thread.start()

    @property
    def pending_bytes(self) -> int:
        """Payload bytes not yet written."""
        return self._pending_bytes

    def submit(self, tenant: str, key: bytes, kind: str, buffers: Payload, meta: dict[str, Any] | None = None) -> bool:
        """Have a record put soon. Returns False if it was dropped: too much waits already, or the writer is closed.

        The buffers are kept, not copied: nobody may change them any more.
        """
        nbytes = sum(piece.nbytes for piece in flat_views(buffers))
        with self._changed:
            if self._is_closing or self._pending_bytes + nbytes > self.max_pending_bytes:
                self.dropped += 1
                return False
            self._jobs.append(_Job(tenant, key, kind, buffers, meta, nbytes))
            self._pending_bytes += nbytes
            self._changed.notify_all()
        return True

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is waiting to be written; False if that took longer than `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs or self._is_ended, timeout_s)
            return not self._jobs

    def close(self) -> None:
        """Write what is waiting and end the thread. Closing twice does nothing."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                if self.store.contains(job.tenant, [job.key], job.kind)[0]:
                    self.store.touch(job.tenant, job.key, job.kind)
                else:
                    self.store.put(job.tenant, job.key, job.kind, job.buffers, job.meta)
                with self._changed:
                    self._jobs.popleft()
                    self._pending_bytes -= job.nbytes
                    self._changed.notify_all()
        finally:
            with self._changed:  # by a bug of ours, perhaps: nobody shall wait for this thread
                self._is_closing = self._is_ended = True
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        """The next record to write, None when closing. It stays in the queue so that `flush` waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closing)
            return self._jobs[0] if self._jobs else None
