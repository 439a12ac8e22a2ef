"""Processes chunks in worker processes, in order, with no more of them in memory than are being worked on."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from itertools import count as counter
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from typing import Any, cast

import pyarrow as pa

from tunesmith.errors import DataError, Problem
from tunesmith.hardware.allocators import give_back_freed_memory
from tunesmith.io.rows import Row
from tunesmith.stages.prepare.work import Chunk, Settings, Worker

CHUNK = 500  # rows
_TIDY = 16  # chunks after which a process returns freed memory to the system
_ALONE = 40  # chunks that one process handles before starting others pays off (20,000 rows)
_AHEAD = 2  # chunks queued per process

Rows = Sequence[tuple[int, Row]]

_worker: Worker | None = None  # of a worker process
_worked = counter(1)  # its chunks


def without_torch() -> None:
    """Keep transformers from importing torch in a process that only reads rows: 270 MB less, and half the start-up time.

    A None entry in `sys.modules` tells the import system that a module is unavailable. Modules already loaded stay loaded.
    """
    cast(dict[str, Any], sys.modules).setdefault("torch", None)
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # about the missing torch


def _start(settings: Settings) -> None:
    global _worker  # noqa: PLW0603 - one worker per process; the executor has no other way to hand over state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    without_torch()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(settings)


def _end_with_parent() -> None:
    """Exit with the parent: a process whose parent was killed would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(rows: Rows) -> Chunk:
    if _worker is None:
        raise AssertionError("the process was not started by _start")
    if next(_worked) % _TIDY == 0:
        tidy()
    return _worker(rows)


def tidy() -> None:
    """Return memory that Arrow and the C library keep for reuse: over many processes it adds up."""
    pa.default_memory_pool().release_unused()
    give_back_freed_memory()


def chunked(rows: Iterator[tuple[int, Row]]) -> Iterator[Rows]:
    """Rows in lists of at most 500."""
    while part := list(islice(rows, CHUNK)):
        yield part


def worked(chunks: Iterator[Rows], worker: Worker, settings: Settings) -> Iterator[Chunk]:
    """The result of each chunk, in order. `data.workers` is the number of processes; `auto` keeps short inputs in this one."""
    asked = settings.data.workers
    count = (os.cpu_count() or 1) if asked == "auto" else asked
    if asked == "auto" or count == 1:
        for rows in chunks if count == 1 else islice(chunks, _ALONE):
            yield worker(rows)
    first = next(chunks, None)
    if first is not None:
        yield from _pooled(chain([first], chunks), settings, count)


def _context() -> BaseContext:
    """How worker processes start: forked from a server with the imports loaded, or spawned where there is no fork server.

    They are not forked from this process, which may have threads (torch, Arrow): a fork would leave them with held locks.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["tunesmith.stages.prepare.preload"])
    return context


def _pooled(chunks: Iterator[Rows], settings: Settings, count: int) -> Iterator[Chunk]:
    context = _context()
    waiting: deque[Future[Chunk]] = deque()
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(settings,)) as pool:
        try:
            for number, rows in enumerate(chunks):
                if number % _TIDY == 0:
                    tidy()
                waiting.append(pool.submit(_work, rows))
                if len(waiting) > _AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            why = "its rows would be missing"
            fix = "give the machine more memory, or set data.workers: 1"
            raise DataError(Problem("TS117", "a worker process that reads rows died", "data.workers", why, fix)) from error
        finally:
            for each in waiting:
                each.cancel()
