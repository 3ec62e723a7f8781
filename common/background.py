"""Work that training does not wait for, done in order by one thread."""

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
        self._jobs: queue.Queue[tuple[Job, Future]] = queue.Queue(limit)
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

    def _work(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:          # whatever it is, the one who waits for the job must hear of it
                future.set_exception(error)
            del job, future                         # the memory of a job's state is not held until the next one
