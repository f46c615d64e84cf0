"""Partial forward passes: read the inputs of modules, stop early, start from the middle.

All of it works through the model's own forward, so that masks, positions and caches stay the
architecture's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from coachhook.errors import NotEnoughMemoryError
from coachhook.models.placement import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result")


class _Enough(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside a forward pass once everything asked for has been seen."""


@contextmanager
def plainly() -> Iterator[None]:
    """Neither autocast nor inference mode inside, whatever the caller is in: what is measured or
    written there is kept, and must not depend on it. Serves as a decorator too."""
    with (
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised it for want of memory, for which it has no class on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_parts(read: Callable[[slice], Result], n: int, most: int) -> list[Result]:
    """`read` over the rows `0..n`, at most `most` at once, and half as many wherever memory does
    not suffice. Raises `NotEnoughMemoryError` if a single row is too much."""
    results = []
    waiting = [slice(first, min(first + most, n)) for first in range(0, n, most)]
    while waiting:
        rows = waiting.pop(0)
        try:
            results.append(read(rows))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if rows.stop - rows.start == 1:
                raise NotEnoughMemoryError(
                    "memory does not hold a pass over a single text beside the model; use shorter "
                    "prompts, or a machine with more memory"
                ) from error
            middle = (rows.start + rows.stop) // 2
            waiting[:0] = [slice(rows.start, middle), slice(middle, rows.stop)]
    return results


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block; every module's own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = training.get(module, False)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where `model` takes its inputs: where its embeddings compute. `model.device` is where the
    first of its weights is, which is nowhere (meta) while that is offloaded."""
    return device_of(model.get_input_embeddings())


def read_pass(
    model: nn.Module,
    inputs: dict[str, Tensor],
    inputs_of: Sequence[nn.Module] = (),
    output_of: nn.Module | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """The inputs of some modules and the output of a block, `(b, t, d)` each, in one pass without
    gradient that stops when it has seen all of them."""
    seen: list[Tensor | None] = [None] * len(inputs_of)
    output: list[Tensor | None] = [None]
    batch = inputs["input_ids"].shape[0]
    # Another thread may be generating with the same model: its passes go on undisturbed.
    thread = threading.get_ident()

    def stop_if_complete() -> None:
        wanted = seen if output_of is None else [*seen, *output]
        if all(value is not None for value in wanted):
            raise _Enough

    def reader(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def read(_: nn.Module, args: tuple[Any, ...]) -> None:
            if threading.get_ident() != thread:
                return
            # OPT flattens batch and sequence before its FFN.
            seen[index] = args[0].detach().reshape(batch, -1, args[0].shape[-1])
            stop_if_complete()

        return read

    def read_output(_: nn.Module, __: tuple[Any, ...], result: Any) -> None:
        if threading.get_ident() != thread:
            return
        output[0] = hidden_of(result).detach()
        stop_if_complete()

    handles = [m.register_forward_pre_hook(reader(i)) for i, m in enumerate(inputs_of)]
    if output_of is not None:
        handles.append(output_of.register_forward_hook(read_output))
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [value for value in seen if value is not None], output[0]


def run_to(block: nn.Module, model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """What `block` returns, as it returns it, in a pass without gradient that goes no further."""
    seen: list[Any] = []

    def stop(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        seen.append(output)
        raise _Enough

    handle = block.register_forward_hook(stop)
    try:
        with torch.no_grad():
            model.base_model(**inputs)
    except _Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


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


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returned: a tensor, or a tuple that starts with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _like(template: Any, hidden: Tensor) -> Any:
    return (hidden, *template[1:]) if isinstance(template, tuple) else hidden


def final_hidden(model: PreTrainedModel, **inputs: Any) -> Any:
    """The base model's output: `.last_hidden_state` stands after the final norm."""
    return model.base_model(**inputs)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 logits `(n, vocabulary)` of final hidden states `(n, d)`."""
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
