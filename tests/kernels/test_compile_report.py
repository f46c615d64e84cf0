import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from coachhook_kernels.compilation import report as compile_report
from coachhook_kernels.compilation.target import TARGETS

pytest.importorskip("triton")
compiles = pytest.mark.slow  # In processes that load Triton first.
TOYS = "tests.support.toy_kernels"
KERNELS = Path(compile_report.__file__).parents[1]


def report(capsys, *arguments):
    """Exit code, and the rows by case and target, of the toy kernels' report."""
    code = compile_report.main(["--module", TOYS, "--json", *arguments])
    rows = json.loads(capsys.readouterr().out)
    return code, {(row["case"], row["target"]): row for row in rows}


@compiles
def test_every_fault_fails_the_report_with_its_reason(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    faults = {
        ("spills", "sm_90"): "spills: ",
        ("more than all vector registers", "gfx942"): "spills: ",
        ("unaligned columns", "sm_90"): "loads of fewer than 16 bytes in a loop of products: ",
        ("too few rows for a warp group", "sm_90"): "no warp-group matrix instruction (HGMMA)",
        ("shared memory", "sm_90"): "shared memory: ",
        ("shared memory", "gfx942"): "shared memory: ",
        ("no tensor cores", "sm_90"): "no tensor-core instruction",
        ("unknown parameter", "sm_90"): "does not compile: ValueError: parameters ['p_values', ",
        ("type error", "sm_90"): "does not compile: ",
    }
    matches = [word for case, _ in faults for word in ("--match", case)]
    code, rows = report(capsys, "--target", "sm_90", "--target", "gfx942", *matches)

    assert code == 1
    for key, reason in faults.items():
        assert any(told.startswith(reason) for told in rows[key]["failures"]), rows[key]
    assert os.environ["TRITON_INTERPRET"] == "1"

    spilled = rows["spills", "sm_90"]
    assert spilled["spills"]["store"] > 0
    assert spilled["spills"]["load"] > 0
    assert spilled["stack"] > 0
    assert spilled["serialized"]
    assert any(told.startswith("local memory: ") for told in spilled["failures"])
    on_amd = rows["more than all vector registers", "gfx942"]
    assert on_amd["spills"]["vgpr"] > 0
    assert any(told.startswith("local memory: ") for told in on_amd["failures"])
    assert "LDG.E.U16" in rows["unaligned columns", "sm_90"]["loads"]
    for target in ("sm_90", "gfx942"):
        large = rows["shared memory", target]
        assert large["shared"] > large["shared_limit"] == TARGETS[target].shared_limit
    assert rows["type error", "sm_90"]["registers"] is None
    # Matrix instructions are demanded of NVIDIA code alone.
    assert rows["no tensor cores", "gfx942"]["failures"] == []


@compiles
def test_a_crash_of_the_compiler_costs_its_own_row_alone(capsys):
    code, rows = report(capsys, "--target", "sm_90", "--match", "crash", "--match", "sound")
    assert code == 1
    assert rows["crash", "sm_90"]["failures"] == ["does not compile: the compiler crashed"]
    sound = rows["sound", "sm_90"]
    assert sound["failures"] == []
    assert sound["tensor_cores"].keys() == {"HGMMA"}
    assert sound["async_copies"] > 0


@compiles
def test_sound_code_passes_on_every_target(capsys):
    code = compile_report.main(["--module", TOYS, "--match", "sound"])
    table = capsys.readouterr().out.splitlines()
    assert code == 0
    assert [line.split()[:2] for line in table[1:5]] == [["sound", name] for name in TARGETS]
    assert all(line.endswith("ok") for line in table[1:5])
    opcodes = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
    assert all(opcode in line for opcode, line in zip(opcodes, table[1:5], strict=True))
    assert table[-1].startswith("4 rows, 0 failed (Triton ")


def test_nothing_to_report_is_neither_sound_nor_faulty(capsys, monkeypatch):
    assert compile_report.main(["--module", "no_such_kernels"]) == 2
    assert "no_such_kernels lists no cases: ModuleNotFoundError" in capsys.readouterr().err
    assert compile_report.main(["--module", TOYS, "--match", "no such case"]) == 2
    assert "No case matches" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "triton", None)
    assert compile_report.main([]) == 2
    assert "Triton is not installed" in capsys.readouterr().err


def test_every_module_with_cases_is_in_the_report():
    with_cases = {
        ".".join(path.relative_to(KERNELS.parent).with_suffix("").parts)
        for path in KERNELS.rglob("*.py")
        if "\ndef compile_cases(" in path.read_text()
    }
    assert with_cases == set(compile_report.MODULES)


@compiles
def test_shipped_kernels_are_sound_on_every_target():
    done = subprocess.run(
        [sys.executable, "-m", "coachhook_kernels.compilation.report", "--json"],
        env={**os.environ, "PYTHONPATH": str(KERNELS.parent), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    asked = [
        (module, case.name, target)
        for module in compile_report.MODULES
        for case in import_module(module).compile_cases()
        for target in case.targets
    ]
    assert len(set(asked)) == len(asked), "two cases of a module share a name"
    assert sorted((row["module"], row["case"], row["target"]) for row in rows) == sorted(asked)
    for module in compile_report.MODULES:
        assert {target for name, _, target in asked if name == module} == set(TARGETS)
    expected = {
        *("module", "case", "target", "triton", "registers", "scalar_registers", "stack", "local"),
        *("spills", "shared", "shared_limit", "tensor_memory", "tensor_cores", "async_copies"),
        *("loads", "serialized", "failures"),
    }
    assert all(row.keys() == expected for row in rows)
    assert all(row["registers"] > 0 for row in rows)

    # The sound report says that no load in a loop of products is narrow; here, that such loads were
    # seen wherever keys and weights are streamed.
    streaming = re.compile(
        "dual_path/(dense|factored|one launch)|decode (decode|open_rows)_kernel"
        "|hook_linear/(score|squares|correct|lower)|key_covariance/triangle"
    )
    # On sm_100 the loops that wait for the matrix units hold another, and are not seen.
    streams = [row for row in rows if streaming.search(row["case"])]
    streams = [row for row in streams if row["target"] in ("sm_80", "sm_90")]
    assert [row["case"] for row in streams if not row["loads"]] == []
