"""What holds for all tests."""

import os
import warnings
from collections.abc import Generator
from typing import Any

import pytest
import torch
from hypothesis import settings

# Assertions of shared helpers say what they compared, as those of test files do.
pytest.register_assert_rewrite("tests.support")

# How long an example takes says nothing on a machine that others work on. CI tries the same
# examples every time; elsewhere each run tries others.
settings.register_profile(
    "suite", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True
)
settings.load_profile("suite")

# Triton reads it when a kernel is defined: without a GPU, kernels are tested for their meaning.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Files that take longest, the longest first: of two workers, each takes the next file when it is
# nearly through with its last, and whatever starts last decides when both are done.
LONGEST = (
    "slow/test_model.py",
    "kernels/test_compile_report.py",
    "slow/test_model_alone.py",
    "kernels/test_hook_linear_kernels.py",
    "cli/test_demo.py",
)
# The CPU time, with that of child processes, that a test not marked `slow` may take, and as much
# again what is set up for it: a module's fixtures count with the first test that asks for them.
# More is a warning, since a slow processor or a first import may be behind it; three times as much
# is a test in the wrong tier, on any processor, and fails.
FAST_SECONDS = 5.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, end in enumerate(LONGEST) if path.endswith(end)), len(LONGEST))

    items.sort(key=place)


def cpu_seconds() -> float:
    # Not the clock's: on a machine with other work every test would be slow.
    return sum(os.times()[:4])


def held_to_fast(item: pytest.Item) -> Generator[None, Any, Any]:
    before = cpu_seconds()
    result = yield
    taken = cpu_seconds() - before
    # On a GPU the kernels are compiled when they are first run.
    if taken > FAST_SECONDS and not any(map(item.get_closest_marker, ("slow", "gpu"))):
        told = f"{item.nodeid} took {taken:.1f} s of CPU time: make it faster or mark it slow"
        if taken > 3 * FAST_SECONDS:
            pytest.fail(told)
        warnings.warn(pytest.PytestWarning(told), stacklevel=1)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from held_to_fast(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from held_to_fast(item))
