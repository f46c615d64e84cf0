"""Partial forward passes: read the inputs of modules, stop early, start from the middle.

Everything goes through the model's own forward, so that masks, positions and caches are left to the
architecture.
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
    """Raised inside a forward pass to stop it, once everything wanted has been read."""


@contextmanager
def plainly() -> Iterator[None]:
    """Turn off autocast and inference mode inside the block: results that are kept must not depend
    on the caller's modes. Also works as a decorator."""
    with (
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` means out of memory, for which torch has no exception class on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_parts(read: Callable[[slice], Result], n: int, most: int) -> list[Result]:
    """Apply `read` to slices of `n` rows, at most `most` rows each; a slice that runs out of memory
    is halved. Raises `NotEnoughMemoryError` if a single row is too much."""
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
    """Evaluation mode inside the block; afterwards each module's own mode is restored."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = training.get(module, False)


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of `model`'s inputs: the one its embeddings compute on. Not `model.device`, which
    is the device of the first weight, and meta while that is offloaded."""
    return device_of(model.get_input_embeddings())


def read_pass(
    model: nn.Module,
    inputs: dict[str, Tensor],
    inputs_of: Sequence[nn.Module] = (),
    output_of: nn.Module | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """The inputs of some modules and the output of a block, `(b, t, d)` each, from one pass without
    gradient that stops once all of them are read."""
    seen: list[Tensor | None] = [None] * len(inputs_of)
    output: list[Tensor | None] = [None]
    batch = inputs["input_ids"].shape[0]
    # Another thread may be using the same model: its passes must not be read or stopped.
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
    """The raw return value of `block`, from a pass without gradient that stops after it."""
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
def starting_after(
    blocks: nn.ModuleList, last: int, template: Any, later: Sequence[int] = ()
) -> Iterator[list[Tensor]]:
    """Inside the block, passes skip blocks 0 to `last`, and block `last` outputs the tensor that
    the caller put into the yielded list; the following ones in it, `(b, d)`, are added to the
    first token of what the blocks `later` put out.

    template: an earlier return value of block `last`, whose form (tensor or tuple) is reproduced.
    """
    injected: list[Tensor] = []

    def adding(i: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            hidden = hidden_of(output)
            first = hidden[:, :1] + injected[i][:, None].to(hidden)
            return with_hidden(output, torch.cat([first, hidden[:, 1:]], dim=1))

        return add

    def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return with_hidden(template, hidden_states)

    def inject(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return with_hidden(template, injected[0])

    handles = [blocks[block].register_forward_hook(adding(i)) for i, block in enumerate(later, 1)]
    touched = list(blocks)[: last + 1]
    replaced = [block.__dict__.get("forward") for block in touched]
    try:
        # An instance attribute shadows `forward`, so that the blocks stay in place with the other
        # attributes that some models read between blocks.
        for block in touched:
            block.forward = inject if block is touched[-1] else skip
        yield injected
    finally:
        for handle in handles:
            handle.remove()
        for block, own in zip(touched, replaced, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's return value: a tensor, or a tuple that starts with one."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_hidden(template: Any, hidden: Tensor) -> Any:
    """A return value of a block of the form of `template`, with other hidden states."""
    return (hidden, *template[1:]) if isinstance(template, tuple) else hidden


def final_hidden(model: PreTrainedModel, **inputs: Any) -> Any:
    """The base model's output: its `.last_hidden_state` is taken after the final norm."""
    return model.base_model(**inputs)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 logits `(n, vocabulary)` of final hidden states `(n, d)`."""
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
