"""Variants of the kernels compiled side by side by running them once, each in some process, so that
the process that times them finds them in Triton's cache on disk."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self
from unittest import mock

import torch

from bench.harness.machine import main_device
from bench.ops.cases import Case, Contenders, contenders
from bench.ops.interpreted import interpreted
from coachhook_kernels.launch import runtime, tuning
from coachhook_kernels.launch.tuning import Config

NOT_IN_TIME = "not compiled in time"
HANGS = 90.0
"""Seconds after which a variant that is not done is taken for hung."""
HUNG = f"not done after {HANGS:.0f} s"
DIED = "the process died of it"


class Variant(NamedTuple):
    """A case with one kernel's configuration; without a kernel, as it is launched."""

    case: Case
    kernel: str | None = None
    config: Config | None = None


@contextmanager
def forced(kernel: str | None, config: Config | None) -> Iterator[None]:
    """Inside the block every lookup of `kernel` finds `config`; if that is None, the default."""
    measured = tuning._measured

    def found(folder: str, name: str, *described: Any) -> Config | None:
        return config if name == kernel else measured(folder, name, *described)

    with mock.patch.object(tuning, "_measured", found):
        yield


def own_name(case: Case, found: Contenders) -> str:
    """The name of the contender that is the case's operation."""
    return next(name for name in found if case.op in name)


def fault(variant: Variant, device: torch.device) -> str | None:
    """Run the variant once. Why it cannot be used, if so."""
    runtime.forget_failures()
    if device.type == "cuda":
        # A dozen of these processes share the memory.
        torch.cuda.empty_cache()
    try:
        with forced(variant.kernel, variant.config):
            found = contenders(variant.case, device, check=False)
            found[own_name(variant.case, found)]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except torch.AcceleratorError:
        # Nothing runs any more in this process.
        os._exit(1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "; ".join(runtime.failures()) or None


def _serve(requests: Connection) -> None:
    device = main_device()
    with torch.inference_mode(), interpreted():
        while True:
            try:
                variant = requests.recv()
            except EOFError:
                return
            requests.send(fault(variant, device))


class Compilers:
    """Processes that compile; they start at the first need and end with the block."""

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes or os.cpu_count() or 1
        self._context = get_context("spawn")
        self._idle: list[Connection] = []
        self._of: dict[Connection, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._of):
            self._end(worker)

    def _start(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        # So that the end of the process is the end of the pipe.
        theirs.close()
        self._of[ours] = process
        return ours

    def _end(self, worker: Connection) -> None:
        process = self._of.pop(worker)
        process.kill()
        process.join()
        worker.close()

    def _give(self, variant: Variant) -> Connection:
        """A process that has been given the variant: an idle one, unless all of these have died."""
        while self._idle:
            worker = self._idle.pop()
            try:
                worker.send(variant)
                return worker
            except OSError:
                self._end(worker)
        worker = self._start()
        # One that dies at once is heard of as one that dies of its variant.
        with suppress(OSError):
            worker.send(variant)
        return worker

    def compile(self, variants: Sequence[Variant], until: float) -> dict[int, str]:
        """Compile, up to the time `until` of `time.monotonic`. By index, the variants that cannot
        be used, and why."""
        waiting = list(enumerate(variants))[::-1]
        busy: dict[Connection, int] = {}
        began: dict[Connection, float] = {}
        faults: dict[int, str] = {}
        while waiting or busy:
            if time.monotonic() >= until:
                faults |= dict.fromkeys([*busy.values(), *dict(waiting)], NOT_IN_TIME)
                for worker in busy:
                    self._end(worker)
                break
            while waiting and (self._idle or len(self._of) < self.processes):
                index, variant = waiting.pop()
                worker = self._give(variant)
                busy[worker], began[worker] = index, time.monotonic()
            patience = min(until, min(began[worker] for worker in busy) + HANGS)
            ready = connection.wait(list(busy), timeout=max(0.0, patience - time.monotonic()))
            if not ready and time.monotonic() < until:
                oldest = min(busy, key=began.__getitem__)
                faults[busy.pop(oldest)] = HUNG
                self._end(oldest)
                continue
            for worker in [worker for worker in busy if worker in ready]:
                index = busy.pop(worker)
                try:
                    said = worker.recv()
                    self._idle.append(worker)
                except (EOFError, OSError):
                    # An error where it had not even read what it was given.
                    said = DIED
                    self._end(worker)
                if said is not None:
                    faults[index] = said
        return faults
