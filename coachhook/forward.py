"""Partial forward passes: read the inputs of modules, stop early, start from the middle.

All of it works through the model's own forward, so that masks, positions and caches stay the
architecture's business.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Enough(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside a forward pass once everything asked for has been seen."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block; the model's own mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def module_inputs(
    model: nn.Module, modules: Sequence[nn.Module], inputs: dict[str, Tensor]
) -> list[Tensor]:
    """The input of each module, `(b, t, d)`, in one pass that stops after the last of them."""
    seen: list[Tensor | None] = [None] * len(modules)
    batch = inputs["input_ids"].shape[0]

    def reader(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            # OPT flattens batch and sequence before its FFN.
            seen[index] = args[0].detach().reshape(batch, -1, args[0].shape[-1])
            if all(value is not None for value in seen):
                raise _Enough

        return read

    handles = [m.register_forward_pre_hook(reader(i)) for i, m in enumerate(modules)]
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [value for value in seen if value is not None]


def block_output(model: nn.Module, block: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The hidden states `(b, t, d)` that `block` puts out, in a pass that stops there."""
    seen: list[Tensor] = []

    def read(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(_hidden(output).detach())
        raise _Enough

    handle = block.register_forward_hook(read)
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    except _Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def record_output(block: nn.Module) -> Iterator[list[Any]]:
    """Collects what `block` returns, as it returns it, during the passes inside."""
    seen: list[Any] = []
    handle = block.register_forward_hook(lambda _m, _a, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def starting_after(blocks: nn.ModuleList, last: int, template: Any) -> Iterator[list[Tensor]]:
    """Inside, passes skip blocks `0..last`; block `last` puts out the tensor in the yielded list.

    template: something block `last` returned before, to know whether it returns a tuple.
    """
    injected: list[Tensor] = []

    def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return _like(template, hidden_states)

    def inject(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return _like(template, injected[0])

    touched = list(blocks)[: last + 1]
    replaced = [block.__dict__.get("forward") for block in touched]
    try:
        # The attribute shadows the method, so that the block keeps its other attributes, which
        # some models read between blocks.
        for block in touched:
            block.forward = inject if block is touched[-1] else skip
        yield injected
    finally:
        for block, own in zip(touched, replaced, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _like(template: Any, hidden: Tensor) -> Any:
    return (hidden, *template[1:]) if isinstance(template, tuple) else hidden


def final_hidden(model: Any, **inputs: Any) -> Any:
    """The base model's output: `.last_hidden_state` stands after the final norm."""
    return model.base_model(**inputs)


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Float32 logits `(n, vocabulary)` of final hidden states `(n, d)`."""
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
