"""Operations as torch sees them: one boundary each, which compilation and autograd stop at.

Like `torch.library.custom_op`, for operations that return fresh tensors and change nothing but what
they say, and without its checks of both at every call, which take as long as the rest of the
boundary.
"""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("coachhook", "FRAGMENT")
Function = Callable[..., Any]


class Operation:
    """`torch.ops.coachhook.<name>`: its annotated implementation, and the same for fake tensors;
    save and backward as in `torch.library.register_autograd`, for reverse mode alone: without them
    no argument may need a gradient. mutates: the argument that it changes in place, if any."""

    def __init__(
        self,
        name: str,
        implementation: Function,
        fake: Function,
        save: Function | None = None,
        backward: Function | None = None,
        mutates: str | None = None,
    ) -> None:
        changed = () if mutates is None else (mutates,)
        schema = torch.library.infer_schema(implementation, mutates_args=changed)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"coachhook::{name}", fake, lib=LIBRARY)
        if backward is not None:
            torch.library.register_autograd(
                f"coachhook::{name}", backward, setup_context=save, lib=LIBRARY
            )
        self._overload = getattr(torch.ops.coachhook, name).default

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self._overload(*arguments)
        # Nothing is recorded: the way through autograd's Python, and back, is left out.
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*arguments)
