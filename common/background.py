"""Work that training does not wait for, done in order by one thread."""

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

Job = Callable[[], Any]


class Background:
    """A thread that does its jobs one after another. It starts with the first, and never keeps the process alive.

    At most ``limit`` jobs wait for their turn (0: any number).
    """

    def __init__(self, name: str, limit: int = 0):
        self.name = name
        self._jobs: queue.Queue[tuple[Job, Future] | None] = queue.Queue(limit)
        self._last: Future | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> Future:
        """Have ``job`` done after those before it; its result or its exception comes by the future.

        Raises queue.Full when ``limit`` jobs are waiting. One thread submits.
        """
        future: Future = Future()
        self._jobs.put_nowait((job, future))
        self._last = future
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
            self._thread.start()
        return future

    def wait(self, seconds: float | None = None) -> bool:
        """Until all jobs are done, or so many seconds have passed; whether they are done."""
        return self._last is None or not wait([self._last], seconds).not_done

    def close(self, seconds: float | None = None) -> bool:
        """As ``wait``; then the thread ends, as soon as it can. A later job starts another."""
        done = self.wait(seconds)
        if self._thread is not None:
            with contextlib.suppress(queue.Full):       # it hangs, with its queue full: it ends with the process
                self._jobs.put_nowait(None)
            self._thread = None
        return done

    def _work(self) -> None:
        while (job_and_future := self._jobs.get()) is not None:
            job, future = job_and_future
            del job_and_future
            try:
                future.set_result(job())
            except BaseException as error:          # whatever it is, the one who waits for the job must hear of it
                future.set_exception(error)
            del job, future                         # the memory of a job's state is not held until the next one
