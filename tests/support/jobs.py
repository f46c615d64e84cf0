"""Runs a Python script in several processes, as a user would with torchrun."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(
    script: str, place: Path, n_processes: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The outcome of `script` (source code, given `place` as its argument) in a job of its own."""
    file = place / "job.py"
    file.write_text(script)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *launch, str(file), str(place)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
