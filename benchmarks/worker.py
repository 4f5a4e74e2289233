"""The child process of the benchmark: builds one engine and does what it is asked to.

Reads requests as JSON lines on stdin and answers with JSON lines on stdout. The first line tells
what to build and the first text to judge; the answer to it comes after the first verdict, so that
the parent can time the whole start. Whatever the libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engines import ENGINES, MULTI, OFFLINE, Source


def main() -> None:
    """Answers requests until it is told to end."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    start = json.loads(sys.stdin.readline())
    kind, source = ENGINES[start["engine"]], Source(**start["source"])
    if start["prepare"]:
        assert kind.prepare is not None
        kind.prepare(source, Path(source.artifacts))
        answer(done=True)
        return
    engine = kind(source)
    engine.judge(start["first"])
    answer(ready=True)

    from footprint import peak_memory

    work = Work(engine)
    after_first = peak_memory()
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        if action == "end":
            break
        answer(**getattr(work, action)(**request))
    files = engine.model_files()
    answer(
        configuration=engine.configuration,
        labels=work.labels,
        memory_after_first_mib=after_first,
        peak_memory_mib=peak_memory(),
        model_bytes=sum(path.stat().st_size for path in files if path.is_file()),
    )


class Work:
    """One case: its texts, and how they are put to the engine.

    Attributes:
        labels: What the engine said about each text last.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.labels: list[bool | None] = []
        self._next = 0
        self._queue = ThreadPoolExecutor(1)  # first come, first served, which a lock is not

    def warm(self, scenario: str, texts: list[str], callers: int, seconds: float) -> dict[str, Any]:
        """Takes the texts, chooses a configuration for them and runs until all is warm.

        Args:
            scenario: Which scenario the rounds are of.
            texts: What the rounds judge.
            callers: Threads that call at once in MultiStream.
            seconds: Least time to spend; every text is judged at least once in any case.
        """
        self.scenario, self.texts, self.callers = scenario, texts, callers
        if scenario == OFFLINE:
            self.engine.tune(texts[:32])
            self.labels = self.engine.judge_many(texts)
            return {}
        start = time.perf_counter()
        self.labels = [self.engine.judge(text) for text in texts]
        while time.perf_counter() - start < seconds:
            for text in texts:
                self.engine.judge(text)
        if scenario == MULTI:  # the callers' first calls open what is opened once a thread
            self._multi(1, 0.0, 2)
            if self.engine.one_at_a_time:
                self.engine.configuration += "; serves one call at a time, the callers queue"
        return {}

    def round(self, calls: int, seconds: float, most: int) -> dict[str, Any]:
        """Runs one round.

        Args:
            calls: Least number of calls, of each caller in MultiStream.
            seconds: Least duration.
            most: Most calls, of each caller, after which the duration does not matter.

        Returns:
            Samples in seconds (of a call; in Offline of a pass over all texts), and the seconds
            that the round took.
        """
        if self.scenario == OFFLINE:
            start = time.perf_counter()
            self.labels = self.engine.judge_many(self.texts)
            taken = time.perf_counter() - start
            return {"samples": [taken], "seconds": taken, "texts": len(self.texts)}
        if self.scenario == MULTI:
            return self._multi(calls, seconds, most)
        start = time.perf_counter()
        samples = self._call(self.engine.judge, calls, start + seconds, most, self._next)
        self._next += len(samples)  # the next round goes on with the texts that follow
        return {
            "samples": samples, "seconds": time.perf_counter() - start, "texts": len(samples),
        }  # fmt: skip

    def _call(self, judge: Any, calls: int, deadline: float, most: int, offset: int) -> list[float]:
        """Judges texts in turn, from the offset on; seconds of each call."""
        samples: list[float] = []
        while len(samples) < most and (len(samples) < calls or time.perf_counter() < deadline):
            text = self.texts[(offset + len(samples)) % len(self.texts)]
            start = time.perf_counter()
            judge(text)
            samples.append(round(time.perf_counter() - start, 8))
        return samples

    def _multi(self, calls: int, seconds: float, most: int) -> dict[str, Any]:
        def queued(text: str) -> Any:
            return self._queue.submit(self.engine.judge, text).result()

        judge = queued if self.engine.one_at_a_time else self.engine.judge
        found: list[list[float]] = [[] for _ in range(self.callers)]
        errors: list[BaseException] = []
        ready = threading.Barrier(self.callers + 1)

        def caller(number: int) -> None:
            ready.wait()
            try:
                found[number] = self._call(
                    judge, calls, time.perf_counter() + seconds, most, number
                )
            except BaseException as error:  # raised again in the main thread
                errors.append(error)

        threads = [threading.Thread(target=caller, args=(n,)) for n in range(self.callers)]
        for thread in threads:
            thread.start()
        ready.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - start
        if errors:
            raise errors[0]
        samples = [sample for part in found for sample in part]
        return {"samples": samples, "seconds": taken, "texts": len(samples)}

    def stream(self, texts: list[str], rows: int) -> dict[str, Any]:
        """Streams a number of rows, the texts over and over, each with a number of its own.

        For engines of ours, which would not compute the very same conversation again.

        Returns:
            Seconds, and resident memory in MiB at ten points of the way.
        """
        from footprint import resident

        step = max(1, rows // 10)
        memory = []
        feed = (f"{texts[number % len(texts)]} {number}" for number in range(rows))
        start = time.perf_counter()
        for number, _ in enumerate(self.engine.stream(feed), start=1):
            if number % step == 0:
                memory.append(resident())
        return {"seconds": time.perf_counter() - start, "resident_mib": memory}


if __name__ == "__main__":
    main()
