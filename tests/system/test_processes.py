"""What the processes of a torchrun job do together, and what the others do when one dies."""

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from coachhook.system.processes import ALONE, Peer, joined
from tests.support.jobs import torchrun

in_a_job = pytest.mark.slow  # Of two processes, and its launcher.
Outcome = tuple[list[dict[str, Any]], str]

JOB = """
import json, os, signal, sys
from pathlib import Path
import torch
from coachhook.errors import ProcessError
from coachhook.system.processes import joined

place = Path(sys.argv[1])
with joined():
    pass  # a job can be joined again
try:
    with joined() as job:
        number = torch.full((2,), job.rank + 1, dtype=torch.float64)
        column = torch.arange(6.0).reshape(2, 3).mT[1]  # not contiguous
        job.sum_([number, column])
        own = {str(i): torch.full((i, 2), i, dtype=torch.bfloat16) for i in job.share(3)}
        everything = job.gather(own if job.is_first else {"1": own["1"]})
        try:
            job.gather({"0": number})
        except ProcessError as error:
            refused = str(error)
        result = {
            "refused": refused,
            "pid": os.getpid(),
            "sums": [number.tolist(), column.tolist()],
            "gathered": {name: rows.tolist() for name, rows in everything.items()},
            "told": job.broadcast_bytes(b"from one" if job.rank == 1 else b"", 1).decode(),
            "silence": job.broadcast_bytes(b"").decode(),
            "all": [b.decode() for b in job.gather_bytes(b"abc"[: job.rank + 1])],
            "everyone": [job.everyone(True), job.everyone(job.is_first)],
            "writes": job.is_first_on_host,
        }
        (place / f"{job.rank}.json").write_text(json.dumps(result))
        job.everyone(True)
        if job.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        job.sum_([number])
except ProcessError as error:
    sys.exit(f"stopped: {error}")
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What each of two processes found, and what the job said after the second was killed."""
    place = tmp_path_factory.mktemp("job")
    outcome = torchrun(JOB, place)
    said = outcome.stdout + outcome.stderr
    files = sorted(place.glob("*.json"))
    assert len(files) == 2, said
    return [json.loads(file.read_text()) for file in files], said


@in_a_job
def test_sums_are_the_same_everywhere(job: Outcome) -> None:
    for result in job[0]:
        assert result["sums"] == [[3, 3], [2, 8]]


@in_a_job
def test_tensors_of_all_processes_meet_by_name(job: Outcome) -> None:
    for result in job[0]:
        assert result["gathered"] == {"0": [], "1": [[1, 1]], "2": [[2, 2], [2, 2]]}


@in_a_job
def test_a_name_is_one_process_s(job: Outcome) -> None:
    for result in job[0]:
        assert "two processes both have '0'" in result["refused"]


@in_a_job
def test_bytes_of_any_length_arrive(job: Outcome) -> None:
    for result in job[0]:
        assert (result["told"], result["silence"]) == ("from one", "")
        assert result["all"] == ["a", "ab"]


@in_a_job
def test_roles(job: Outcome) -> None:
    assert [result["everyone"] for result in job[0]] == [[True, False]] * 2
    assert [result["writes"] for result in job[0]] == [True, False]


@in_a_job
def test_the_survivor_stops_and_names_the_dead(job: Outcome) -> None:
    results, said = job
    (stopped,) = re.findall(r"^stopped: (.*)$", said, re.MULTILINE)
    assert stopped.startswith(f"process 1 (pid {results[1]['pid']} on ")
    assert "process 0 of 2 stops too" in stopped


def test_without_torchrun_everything_is_a_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with joined() as job:
        assert job is ALONE
        assert not dist.is_initialized()
    x = torch.ones(2)
    ALONE.sum_([x])
    assert x.tolist() == [1, 1]
    assert list(ALONE.share(3)) == [0, 1, 2]
    assert ALONE.gather({"a": x})["a"].tolist() == [1, 1]
    assert ALONE.gather_bytes(b"x") == [b"x"]
    assert (ALONE.is_first, ALONE.is_first_on_host, ALONE.everyone(False)) == (True, True, False)


def test_a_job_of_the_callers_own_is_left_as_it_was() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with joined() as job:
            assert job.size == 1
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_killed_process_is_gone_before_its_parent_notices() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    peer = Peer(0, child.pid, os.uname().nodename)
    assert not peer.is_gone()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert peer.is_gone()
    child.communicate()
    assert peer.is_gone()
    assert not Peer(0, child.pid, "another host").is_gone()
