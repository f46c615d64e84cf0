"""The processes of a job started by torchrun, or a single process on its own.

All of them run the same program. A collective is an operation that every process calls, in the same
order. If one process dies, the others do not wait for it: they stop with a `ProcessError` that
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

# Only for a process that hangs: a dead one is noticed sooner (see `_wait`). Long, because between
# two collectives one process may have more work than the others.
_TIMEOUT = timedelta(hours=1)
# How often a waiting process checks that the others are alive; and how long it searches for the one
# whose end broke a connection, since the system closes a process's sockets before removing it.
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
        """Whether it has ended; false for a process on another host, which cannot be seen."""
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
    """A job as seen by one of its processes. rank: this process's number, from 0; peers: all
    processes of the job by number, this one included; empty for a process on its own.

    Every collective raises `ProcessError` if another process ends before its part is done, or
    cannot be reached.
    """

    rank: int = 0
    peers: tuple[Peer, ...] = ()

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.peers) or 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints, and writes what only one process may write."""
        return self.rank == 0

    @property
    def is_first_on_host(self) -> bool:
        """Whether this process writes the files that each host keeps for itself."""
        hosts = [peer.host for peer in self.peers]
        return not hosts or hosts.index(hosts[self.rank]) == self.rank

    def share(self, n: int) -> range:
        """The indices of this process's share of `n` pieces of work."""
        return range(self.rank, n, self.size)

    def everyone(self, flag: bool) -> bool:
        """Collective: whether `flag` is true in every process."""
        count = torch.tensor([int(flag)])
        self.sum_([count])
        return int(count) == self.size

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Collective: replace each tensor, in place, by its sum over all processes.

        Shapes, dtypes and device types must be the same in every process.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            usable = _usable(tensor.contiguous())
            self._wait(partial(dist.all_reduce, usable, async_op=True))
            if usable is not tensor:
                tensor.copy_(usable)

    def broadcast_bytes(self, data: bytes, source: int = 0) -> bytes:
        """Collective: the `data` of process `source`; that of the others is ignored."""
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
        """Collective: the named tensors of all processes, on the CPU, in the order of processes.

        Shapes and dtypes may differ, and a process may pass none. Raises `ProcessError` if two
        processes use the same name.
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
        # torch's own wait would not notice a signal or, on a GPU, the end of another process.
        try:
            work = start()
            pause, looked, suspected = 1e-4, time.monotonic(), False
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
                if time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    gone = any(peer.is_gone() for peer in self.peers)
                    # Wait one more interval: a process that ended after its part may have sent it.
                    if gone and suspected:
                        raise self._broken("the others cannot go on without it")
                    suspected = gone
            work.wait()
        except RuntimeError as error:
            raise self._broken(str(error).strip().split("\n")[0]) from error

    def _broken(self, reason: str) -> ProcessError:
        """The error to raise when a collective fails; names processes that have ended, if any."""
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

    A collective. A process group that the caller has initialised is used and left as it is.
    Otherwise the job described by torchrun's environment is joined, with nccl for tensors on GPUs
    if every process has a GPU of its own (then its device "cuda"), and gloo for all others. If
    torchrun stops this process because another has died, a `ProcessError` names the dead one.
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
        # No process leaves while another may still be waiting for its data.
        processes.everyone(True)
    except BaseException as error:
        if previous is not None and isinstance(error, ProcessError):
            # This process is about to stop anyway; torchrun must not cut its message short.
            previous = signal.SIG_IGN
        if owned and dist.group.WORLD is not None:
            # Otherwise destroying the group would wait for collectives that never finish.
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
        # Without a prefix of its own, a second group would find the first one's addresses.
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
    """Turn SIGTERM into a `ProcessError`. Returns the previous handler, or None if it was kept."""
    is_main = threading.current_thread() is threading.main_thread()
    if processes.size == 1 or not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return None

    def stop(*_: Any) -> None:
        # Ignore further signals, which would cut the first one's message short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise processes._broken("it was told to (SIGTERM)")

    return signal.signal(signal.SIGTERM, stop)


def _usable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it on a device that this job's backend can send from."""
    devices = [pair.split(":")[0] for pair in dist.get_backend_config().split(",")]
    if tensor.device.type in devices:
        return tensor
    return tensor.to("cpu" if "cpu" in devices else devices[0])
