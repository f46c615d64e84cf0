"""What a wheel of the project carries beside its modules."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import coachhook_kernels

ROOT = Path(coachhook_kernels.__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def test_configurations_and_types_are_in_the_wheel(tmp_path: Path) -> None:
    project, kernels = tmp_path / "project", "kernels/coachhook_kernels"
    for folder in ("coachhook", kernels):
        shutil.copytree(
            ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    made_up = project / kernels / "configs" / "nvidia_made_up" / "a_kernel.json"
    made_up.parent.mkdir(parents=True)
    made_up.write_text("[]")
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    configs = (project / kernels / "configs").rglob("*.json")
    expected = {path.relative_to(project / "kernels").as_posix() for path in configs}
    assert len(expected) > 0
    assert expected | {"coachhook_kernels/py.typed"} <= carried
