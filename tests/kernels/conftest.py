"""Triton's interpreter, in three quarters of its time."""

import inspect
from functools import cache
from typing import Any

try:
    from triton.language.core import is_builtin
    from triton.runtime import interpreter
except ImportError:
    pass  # The tests that interpret a kernel are skipped.
else:

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        """Triton's own looks through all of its language at each call of a device function, to find
        it replaced already by the kernel that calls."""
        for name in builtins_of(package):
            member = getattr(package, name)
            if not is_builtin(member):
                return
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
