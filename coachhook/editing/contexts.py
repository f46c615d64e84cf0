"""The texts an edit's keys are read from, and how they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from coachhook.facts.request import EditRequest
from coachhook.hooks.layer import HookLinear
from coachhook.models.language_model import LanguageModel
from coachhook.models.reading import read_padded
from coachhook.models.tokens import Padded, encode_request, pad


@dataclass(frozen=True)
class Contexts:
    """The texts that keys are read from: all bare prompts, then all prompts in each context."""

    padded: Padded
    n_requests: int

    @classmethod
    def of(
        cls, lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str]
    ) -> "Contexts":
        rows = [
            encode_request(lm.tokenizer, request, text, with_target=False)
            for text in ("{}", *contexts)
            for request in requests
        ]
        return cls(pad(rows, lm.pad_id, lm.device), len(requests))

    def read(
        self,
        model: nn.Module,
        hooks: Sequence[HookLinear],
        tokens: int,
        *,
        block: nn.Module | None = None,
        temporary: Sequence[HookLinear] = (),
        what: Callable[[HookLinear, Tensor, slice], Tensor] = lambda _, keys, __: keys,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Values at each row's subject, on the CPU: per hook its keys `(b, d_in)`, or the result of
        `what` applied to the keys `(b', t, d_in)` of a slice of rows; and the output of `block`,
        float32 `(b, d)`.

        temporary: hooks that correct only the subjects. tokens: how many to read in one pass.
        """
        at = self.padded.subject_mask()

        def open_subjects(rows: slice) -> None:
            for hook in temporary:
                hook.open_at = at[rows].to(hook.down.device)

        try:
            by_hook, output = read_padded(
                model,
                self.padded,
                at,
                hooks,
                lambda hook, keys, rows: [what(hook, keys, rows)],
                at_once=max(1, tokens // at.shape[1]),
                block=block,
                before=open_subjects,
            )
        finally:
            for hook in temporary:
                hook.open_at = None
        return [made for (made,) in by_hook], output
