"""The engine with values from one gradient instead of optimised ones.

UltraEdit takes the wanted output of a module from a single backward pass, with each feature scaled
by its size in all edits so far. Its step size fits the scale of its models; here the length of the
shift is in units of the hidden state's norm, as the bound of the common values is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import coachhook as ch
from bench.comparison.editors.hooked import Hooked
from bench.comparison.editors.setting import Setting
from coachhook.editing.value_rows import contexts_of, prepare, score
from coachhook.models.passes import eval_mode, starting_after


class OneGradient(Hooked):
    """length: of the shift against the gradient, in units of `‖h‖`; all else is the engine's."""

    def __init__(self, setting: Setting, length: float) -> None:
        super().__init__(setting)
        self._setting, self._length = setting, length
        self._seen = 0
        self._square = torch.zeros(())

    def edit(self, requests: Sequence[ch.EditRequest], values: Tensor) -> None:
        hidden, gradient = self._gradients(requests)
        self._seen += len(gradient)
        square = gradient.square().mean(0)
        self._square = self._square + len(gradient) / self._seen * (square - self._square)
        step = gradient / (self._square.sqrt() + 1e-12)
        step *= self._length * hidden.norm(dim=-1, keepdim=True) / step.norm(dim=-1, keepdim=True)
        super().edit(requests, hidden - step)

    def _gradients(self, requests: Sequence[ch.EditRequest]) -> tuple[Tensor, Tensor]:
        """The last hooked block's output at each subject, and the gradient of the targets' negative
        log-likelihood with respect to it, both float32 `(n, d)`."""
        setting, config = self._setting, self._setting.config.values
        model, layer = setting.lm.model, setting.layers[-1]
        groups = contexts_of(setting.lm.tokenizer, requests, config)
        blocks = setting.architecture.blocks(model)
        with eval_mode(model), torch.no_grad():
            rows, template = prepare(setting.lm, blocks, layer, groups, config.gain)
            hidden = rows.hidden[: len(requests), 0].float()
            reference = hidden.new_full(
                (len(hidden), len(model.get_output_embeddings().weight)), torch.nan
            )
            with starting_after(blocks, layer, template) as injected:
                none = torch.zeros_like(hidden)[:, None]
                _, gradient = score(model, rows, none, injected, 0.0, reference)
        return hidden, gradient[:, 0]
