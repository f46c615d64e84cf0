"""The memory readout on a model that two processes share, over gloo: as in one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coachhook import HookSet
from tests.support import memory_parallel_worker as worker
from tests.support.memory_readout import editor_of, with_rows


@pytest.mark.slow  # A job of two processes, and its launcher.
def test_two_processes_that_share_a_model_say_what_one_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    with editor_of(tied=False) as editor:
        editor.model.save_pretrained(tmp_path / "model")
        with_rows(editor).save_pretrained(tmp_path / "edits")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, "--nproc-per-node", "2", worker.__file__, str(tmp_path)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (load_file(tmp_path / f"rank{i}.safetensors") for i in range(2))
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    whole = worker.measure(one, HookSet.from_pretrained(tmp_path / "edits"))
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        # Up to the order of float32 sums, by which the unhooked models differ too.
        scale = float(value.abs().max())
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5 * scale)
    for name in ("hooked 2", "disabled 0", "disabled 2", "detached 0", "detached 1"):
        assert torch.equal(first[name], first[f"unhooked {name[-1]}"]), name
    for name in ("hooked 0", "hooked 1", "disabled 1", "hooked generated"):
        assert not torch.equal(first[name], first[f"unhooked {name.split()[1]}"]), name
