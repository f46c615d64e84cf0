"""The house itself: who may import whom, how long a file may be, what ships, what docstrings cite.

Every rule here is read off the files; nothing of the project is imported.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "coachhook": ROOT / "coachhook",
    "coachhook_kernels": ROOT / "kernels/coachhook_kernels",
}

# From the bottom up: a room may import those before it and itself.
ROOMS = (
    "coachhook_kernels",
    "coachhook.errors",
    "coachhook.system",
    "coachhook.facts",
    "coachhook.models",
    "coachhook.hooks",
    "coachhook.statistics",
    "coachhook.config",
    "coachhook.journal",
    "coachhook.readouts",
    "coachhook.storage",
    "coachhook.plan",
    "coachhook.memory_plan",
    "coachhook.hookset",
    "coachhook.editing",
    "coachhook.evaluation",
    "coachhook.editor",
    "coachhook.calibration",
    "coachhook.session",
    "coachhook.report",
    "coachhook.cli",
    "coachhook.__main__",
)
KERNEL_ROOMS = (
    "coachhook_kernels.errors",
    "coachhook_kernels.compilation.case",
    "coachhook_kernels.compilation.record",
    "coachhook_kernels.launch",
    "coachhook_kernels.scores",
    "coachhook_kernels.delta",
    "coachhook_kernels.gate",
    "coachhook_kernels.dual_path",
    "coachhook_kernels.hook_linear",
    "coachhook_kernels.hook_linear_sequence",
    "coachhook_kernels.key_covariance",
    "coachhook_kernels.memory",
    "coachhook_kernels.compilation",
)

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60
# Said at the head of a longer file, with the reason.
LONGER = "Longer than 400 lines:"


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def imports(module: str, path: Path) -> Iterator[str]:
    """The modules of ours that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.append(whole if whole in MODULES else node.module)
        yield from (name for name in names if name in MODULES and name != module)


def room_of(module: str, rooms: tuple[str, ...]) -> int | None:
    within = [i for i, room in enumerate(rooms) if f"{module}.".startswith(f"{room}.")]
    return max(within, key=lambda i: len(rooms[i])) if within else None


def test_every_import_goes_down() -> None:
    upward = []
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module in PACKAGES:
            continue  # the front door, which names what is public
        rooms = KERNEL_ROOMS if module.startswith("coachhook_kernels.") else ROOMS
        own = room_of(module, rooms)
        assert own is not None, f"{module} is in no room: add it to the order of this file"
        for other in imports(module, path):
            its = room_of(other, rooms)
            if its is None and other not in PACKAGES:
                upward.append(f"{module} -> {other} (another package)")
            elif its is not None and its > own:
                upward.append(f"{module} -> {other}")
    assert upward == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: set(imports(module, path)) for module, path in MODULES.items()}
    # The front doors name everything, and nothing behind them goes through them.
    for package in PACKAGES:
        graph[package] = set()
    list(TopologicalSorter(graph).static_order())


def sources() -> list[Path]:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in tracked.stdout.split() if (ROOT / name).exists()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_files_and_functions_fit_in_a_readers_head() -> None:
    long = []
    for path in sources():
        text = path.read_text()
        tree = ast.parse(text)
        if len(text.splitlines()) > MOST_LINES and LONGER not in (ast.get_docstring(tree) or ""):
            long.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert long == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_a_wheel_holds_every_file_of_both_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = apply_configuration(
        Distribution({"script_name": "setup.py"}), ROOT / "pyproject.toml"
    )
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    packed = {
        Path(name).relative_to(build.build_lib)
        for name in build.get_outputs(include_bytecode=False)
    }
    tracked = subprocess.run(
        ["git", "ls-files", "coachhook", "kernels/coachhook_kernels"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    wanted = {Path(name.removeprefix("kernels/")) for name in tracked}
    assert wanted - packed == set()


CITED = re.compile(r"csrc_notes/[\w-]+\.md(?:,\s+\"[^\"]+\"(?:\s+and\s+\"[^\"]+\")*)?")


def test_what_docstrings_cite_is_there() -> None:
    """Pages and headings; and no page of another place."""
    missing = []
    for path in MODULES.values():
        text = " ".join(path.read_text().split())
        assert "design section" not in text, f"{path} cites a page that is not in the repository"
        for cited in CITED.findall(text):
            page = ROOT / cited.split(",")[0]
            if not page.exists():
                missing.append(cited)
                continue
            headings = {
                line.lstrip("# ") for line in page.read_text().splitlines() if line[:1] == "#"
            }
            missing += [name for name in re.findall(r'"([^"]+)"', cited) if name not in headings]
    assert missing == []
