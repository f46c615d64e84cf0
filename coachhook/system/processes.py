"""The processes of a job that torchrun started, or the only one there is.

All of them run the same program. What they do together is a collective: every process calls it, in
the same order. Where one dies, the others do not wait for it: they stop with a `ProcessError` that
names it.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from coachhook.errors import ProcessError

# A dead process is noticed by itself, so that this is only for one that hangs. Between two
# collectives a process may be long at work on a share that is larger than the others'.
_TIMEOUT = timedelta(hours=1)
# How often a waiting process looks whether the others live, and how long it looks for the one whose
# end broke a connection: the system closes a process's sockets before it takes the process away.
_LOOK_SECONDS = 0.5
_SEARCH_SECONDS = 3.0
_joined_before = count()
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Peer:
    """One process of a job."""

    rank: int
    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    def is_gone(self) -> bool:
        """Whether it has ended, as far as can be seen from this host."""
        if self.host != socket.gethostname():
            return False
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@dataclass(frozen=True)
class Processes:
    """A job as one of its processes sees it. rank: its number, from 0; peers: all processes of the
    job by their numbers, this one included, or nothing for a process on its own.

    Every method that says "collective" raises `ProcessError` where another process ends before its
    part is done, or cannot be reached.
    """

    rank: int = 0
    peers: tuple[Peer, ...] = ()

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.peers) or 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, and that writes what only one may write."""
        return self.rank == 0

    @property
    def is_first_on_host(self) -> bool:
        """Whether this is the process that writes what every host has for itself."""
        hosts = [peer.host for peer in self.peers]
        return not hosts or hosts.index(hosts[self.rank]) == self.rank

    def share(self, n: int) -> range:
        """Which of `n` pieces of work are this process's."""
        return range(self.rank, n, self.size)

    def everyone(self, flag: bool) -> bool:
        """Collective: whether `flag` is true in every process."""
        count = torch.tensor([int(flag)])
        self.sum_([count])
        return int(count) == self.size

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Collective: put into each tensor, in place, the sum of all processes' tensors.

        Shapes, dtypes and kinds of device are the same in every process.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            usable = _usable(tensor.contiguous())
            self._wait(partial(dist.all_reduce, usable, async_op=True))
            if usable is not tensor:
                tensor.copy_(usable)

    def broadcast_bytes(self, data: bytes, source: int = 0) -> bytes:
        """Collective: the `data` of process `source`; that of the others is not looked at."""
        if self.size == 1:
            return data
        length = _usable(torch.tensor([len(data)]))
        self._wait(partial(dist.broadcast, length, source, async_op=True))
        if not int(length):
            return b""
        if self.rank == source:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            content = torch.empty(int(length), dtype=torch.uint8)
        usable = _usable(content)
        self._wait(partial(dist.broadcast, usable, source, async_op=True))
        return data if self.rank == source else usable.cpu().numpy().tobytes()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Collective: the `data` of every process, in the order of their numbers."""
        return [self.broadcast_bytes(data, source) for source in range(self.size)]

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Collective: the named tensors of all processes, on the CPU, sorted by process.

        Shapes and dtypes may differ, and a process may have none. No name comes twice.
        """
        if self.size == 1:
            return {name: tensor.cpu() for name, tensor in tensors.items()}
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        gathered: dict[str, Tensor] = {}
        for data in self.gather_bytes(save(own)):
            found = load(data)
            twice = found.keys() & gathered.keys()
            if twice:
                raise ProcessError(
                    f"two processes both have {sorted(twice)[0]!r}; each piece of work must be one "
                    "process's (see Processes.share)"
                )
            gathered |= found
        return gathered

    def _wait(self, start: Callable[[], Any]) -> None:
        """Start a collective and wait until it is done, or until another process has ended."""
        # torch's own wait would neither notice a signal nor, on a GPU, the end of another process.
        try:
            work = start()
            pause, looked, suspected = 1e-4, time.monotonic(), False
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
                if time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    gone = any(peer.is_gone() for peer in self.peers)
                    # One that left after its part leaves a moment to read what it sent.
                    if gone and suspected:
                        raise self._broken("the others cannot go on without it")
                    suspected = gone
            work.wait()
        except RuntimeError as error:
            raise self._broken(str(error).strip().split("\n")[0]) from error

    def _broken(self, reason: str) -> ProcessError:
        """What to tell after a failure that has its cause in another process, if that is found."""
        until = time.monotonic() + _SEARCH_SECONDS
        while not (gone := [p for p in self.peers if p.is_gone()]) and time.monotonic() < until:
            time.sleep(0.05)
        me = f"process {self.rank} of {self.size}"
        if gone:
            names = ", ".join(map(str, gone))
            verb = "has" if len(gone) == 1 else "have"
            return ProcessError(
                f"{names} of this job {verb} ended before its work was done, and {me} stops too; "
                "look for its own message, or for a kill by the system (memory), and start the job "
                "again"
            )
        here = socket.gethostname()
        elsewhere = ", ".join(str(peer) for peer in self.peers if peer.host != here)
        hint = f"; look at {elsewhere}" if elsewhere else ""
        return ProcessError(
            f"{me} stops: {reason}; all processes of this job on {here} are alive{hint}; "
            "start the job again"
        )


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this job, for as long as the block lasts; `ALONE` outside torchrun.

    A collective. A job that the caller has initialised is used as it is, and left so. Else the one
    that torchrun's environment describes is joined: with nccl for tensors on GPUs if every process
    has one of its own, which is then the device "cuda", and gloo for all others. Where torchrun
    asks this process to stop, because another one has died, a `ProcessError` names the dead one.
    """
    owned = not _initialised()
    if owned:
        if not _under_torchrun():
            yield ALONE
            return
        _initialise()
    processes = ALONE if dist.get_world_size() == 1 else _introduced()
    previous = _stop_by_error(processes)
    try:
        yield processes
        # Nobody leaves while another may still wait for what it sent.
        processes.everyone(True)
    except BaseException as error:
        if previous is not None and isinstance(error, ProcessError):
            # The process is about to stop by itself; torchrun must not cut its message short.
            previous = signal.SIG_IGN
        if owned and dist.group.WORLD is not None:
            # Without this, leaving would wait for collectives that will never be done.
            dist.group.WORLD.abort()
        raise
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
        if owned:
            dist.destroy_process_group()


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _under_torchrun() -> bool:
    return all(os.environ.get(name) for name in _TORCHRUN) and dist.is_available()


def _initialise() -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        local, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        torch.cuda.set_device(local % n_gpus)
        # nccl needs a GPU for each process.
        if dist.is_nccl_available() and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= n_gpus:
            backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
        # Without a name of its own a job would find the addresses of the one before it.
        name = f"coachhook {next(_joined_before)}"
        store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ProcessError(
            f"cannot join the other processes at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {reason}; start the job again"
        ) from error


def _introduced() -> Processes:
    """The processes of the initialised job, each with its process id and host."""
    rank, size = dist.get_rank(), dist.get_world_size()
    strangers = Processes(rank, tuple(Peer(i, os.getpid(), "?") for i in range(size)))
    me = json.dumps([os.getpid(), socket.gethostname()]).encode()
    cards = [json.loads(data) for data in strangers.gather_bytes(me)]
    return Processes(rank, tuple(Peer(i, pid, host) for i, (pid, host) in enumerate(cards)))


def _stop_by_error(processes: Processes) -> Any:
    """Turn SIGTERM into a `ProcessError`; returns what handled it, or None if that stays so."""
    is_main = threading.current_thread() is threading.main_thread()
    if processes.size == 1 or not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return None

    def stop(*_: Any) -> None:
        # Once is enough: another one must not cut short the message of the first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise processes._broken("it was told to (SIGTERM)")

    return signal.signal(signal.SIGTERM, stop)


def _usable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it on a device that this job's backend can send from."""
    devices = [pair.split(":")[0] for pair in dist.get_backend_config().split(",")]
    if tensor.device.type in devices:
        return tensor
    return tensor.to("cpu" if "cpu" in devices else devices[0])
