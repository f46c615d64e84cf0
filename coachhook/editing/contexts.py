"""The texts that an edit's keys are taken from, and how they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.facts.request import EditRequest
from coachhook.hooks.layer import HookLinear
from coachhook.models.passes import in_parts, input_device, read_pass
from coachhook.models.tokens import Padded, encode_request, pad


@dataclass(frozen=True)
class Contexts:
    """The texts an edit's keys are taken from: every bare prompt, then every prefixed one."""

    padded: Padded
    n_requests: int

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, requests: Sequence[EditRequest], contexts: Sequence[str]
    ) -> "Contexts":
        rows = [
            encode_request(tokenizer, request, text, with_target=False)
            for text in ("{}", *contexts)
            for request in requests
        ]
        return cls(pad(rows, tokenizer.pad_token_id, input_device(model)), len(requests))

    def subject_mask(self) -> Tensor:
        """Where each row's subject ends, bool `(b, t)`."""
        columns = torch.arange(self.padded.ids.shape[1], device=self.padded.ids.device)
        return columns == self.padded.subject[:, None]

    def read(
        self,
        model: Any,
        hooks: Sequence[HookLinear],
        tokens: int,
        *,
        block: nn.Module | None = None,
        temporary: Sequence[HookLinear] = (),
        what: Callable[[HookLinear, Tensor, slice], Tensor] = lambda _, keys, __: keys,
    ) -> tuple[list[Tensor], Tensor | None]:
        """At each row's subject, on the CPU: for every hook its keys `(b, d_in)`, or what `what`
        makes of its keys `(b', t, d_in)` in some rows; the output of `block`, float32 `(b, d)`.

        temporary: hooks that correct the subjects alone. tokens: how many are read at once.
        """
        mask, inputs = self.subject_mask(), self.padded.inputs()

        def some(rows: slice) -> tuple[list[Tensor], Tensor | None]:
            here = mask[rows]
            for hook in temporary:
                hook.open_at = here.to(hook.down.device)
            part = {name: tensor[rows] for name, tensor in inputs.items()}
            keys, output = read_pass(model, part, hooks, block)
            values = [what(hook, k, rows) for hook, k in zip(hooks, keys, strict=True)]
            found = [value[here.to(value.device)].cpu() for value in values]
            return found, None if output is None else output[here.to(output.device)].float().cpu()

        try:
            parts = in_parts(some, len(mask), max(1, tokens // mask.shape[1]))
        finally:
            for hook in temporary:
                hook.open_at = None
        outputs = [output for _, output in parts if output is not None]
        by_hook = [torch.cat(pieces) for pieces in zip(*(found for found, _ in parts), strict=True)]
        return by_hook, torch.cat(outputs) if outputs else None
