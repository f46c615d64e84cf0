"""The host's time of a hooked layer: both ways through every gate are timed, without a GPU."""

import json
import os
import subprocess
import sys

import pytest


def test_every_way_is_timed_up_to_the_launch() -> None:
    pytest.importorskip("triton")
    # In a process of its own, because this one may interpret its kernels and prepare no launches.
    done = subprocess.run(
        [sys.executable, "-m", "bench.ops.host_time", "--rounds", "1", "--json", "-"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 3 * 2 * 2 + 2
    for row in rows:
        timed = [value for value in row.values() if isinstance(value, float)]
        assert len(timed) == (4 if row["gate"] == "memory" else 5)
        assert min(timed) > 0
    launches = {(row["gate"], row["rank"], row["rows"]): row["launches of Triton"] for row in rows}
    for gate in ("calibrated", "sequence"):
        assert launches[gate, None, 1] == 1
        assert launches[gate, None, 128] == 2
    # The gate's two, and one for the block that is written.
    assert launches["memory", None, 1] == launches["memory", None, 128] == 3
    assert min(launches.values()) >= 1
