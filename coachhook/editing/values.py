"""Target values: the hidden state at the subject's last token that makes the target likely.

Adam on a shift of the last hooked block's output (paper section 3; MEMIT's recipe), many requests
at once; `value_rows` computes what does not depend on the shift.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from coachhook.config import ValueConfig
from coachhook.editing.value_rows import contexts_of, prepare, score
from coachhook.errors import ModelError, NotEnoughMemoryError
from coachhook.facts.request import EditRequest
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import eval_mode, is_out_of_memory, starting_after
from coachhook.models.tokens import Row
from coachhook.system.processes import ALONE, Processes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetValues:
    """hidden float32 `(n, d)`: wanted output of the last hooked block at each subject's last token;
    loss float32 `(n,)`: mean negative log-likelihood (nats) of the targets with that output."""

    hidden: Tensor
    loss: Tensor


def optimise_values(
    lm: LanguageModel,
    architecture: Architecture,
    layer: int,
    requests: Sequence[EditRequest],
    config: ValueConfig,
    progress: Callable[[int], None] = lambda _: None,
    processes: Processes = ALONE,
) -> TargetValues:
    """Optimise the value of every request at the output of block `layer`.

    Runs as many requests at once as `config.tokens` allows, and half as many when out of memory.
    `progress` is called with the number of requests just done. With several `processes` this is a
    collective: each optimises its share of the requests, and all return every value. Raises
    `NotEnoughMemoryError` if a single request does not fit, `ModelError` for a value that is not
    finite.
    """
    groups = contexts_of(lm.tokenizer, requests, config)
    # Tokens in each request's rows, padded to the longest.
    sizes = [len(groups) * max(len(group[i].ids) for group in groups) for i in range(len(requests))]
    # Sorted by length, so that little of a pass is padding.
    order = sorted(range(len(requests)), key=lambda i: sizes[i])
    waiting = [order[place] for place in processes.share(len(requests))]
    optimised: dict[str, Tensor] = {}
    with eval_mode(lm.model), torch.no_grad():
        together = partial(_together, lm, architecture, layer, config)
        window = getattr(lm.model.config.get_text_config(), "sliding_window", None)
        for chosen, values in _in_groups(
            together, groups, sizes, waiting, config.tokens, window, progress
        ):
            for i, hidden, loss in zip(chosen, values.hidden, values.loss, strict=True):
                if not hidden.isfinite().all():
                    raise ModelError(
                        f"the target value of {requests[i].prompt[:80]!r} is not finite; the model "
                        "gives numbers that its dtype does not hold: load it in a wider one"
                    )
                optimised[f"hidden.{i}"], optimised[f"loss.{i}"] = hidden.clone(), loss.clone()
    optimised = processes.gather(optimised)
    everyone = range(len(requests))
    return TargetValues(
        torch.stack([optimised[f"hidden.{i}"] for i in everyone]).to(lm.device),
        torch.stack([optimised[f"loss.{i}"] for i in everyone]).to(lm.device),
    )


def _in_groups(
    together: Callable[[list[list[Row]], Callable[[int], None]], TargetValues],
    groups: Sequence[Sequence[Row]],
    sizes: Sequence[int],
    waiting: Sequence[int],
    tokens: int,
    window: int | None,
    progress: Callable[[int], None],
) -> Iterator[tuple[Sequence[int], TargetValues]]:
    """The values of the requests `waiting` (indices, in ascending size), a group at a time.

    together: optimises the rows of one group. tokens: most in one group; reduced when out of
    memory. window: width of the model's sliding attention window, if it has one.
    """
    while waiting:
        chosen = waiting[: _how_many([sizes[i] for i in waiting], tokens)]
        # Padding between tokens would use up a sliding window; a single request has no padding.
        if window is not None and 2 * sizes[chosen[-1]] // len(groups) > window:
            chosen = waiting[:1]
        done = 0

        def tell(more: int) -> None:
            nonlocal done
            done += more
            progress(more)

        try:
            values = together([[group[i] for i in chosen] for group in groups], tell)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            progress(-done)
            if len(chosen) == 1:
                raise NotEnoughMemoryError(
                    f"memory does not hold the {sizes[chosen[0]]} tokens of one edit in "
                    f"{len(groups)} contexts beside the model; give fewer contexts "
                    "(ValueConfig.contexts) or a shorter prompt"
                ) from error
            tokens = len(chosen) * sizes[chosen[-1]] // 2
            logger.warning(
                "out of memory with %d edits at once; going on with %d tokens a pass",
                len(chosen),
                tokens,
            )
            continue
        yield chosen, values
        waiting = waiting[len(chosen) :]


def _how_many(sizes: Sequence[int], tokens: int) -> int:
    """How many requests of ascending sizes fit a rectangle of `tokens`, but at least one."""
    return max(1, sum(n * size <= tokens for n, size in enumerate(sizes, 1)))


def _together(
    lm: LanguageModel,
    architecture: Architecture,
    layer: int,
    config: ValueConfig,
    groups: Sequence[Sequence[Row]],
    progress: Callable[[int], None],
) -> TargetValues:
    """The values of n requests; each drops out of the passes once it has converged."""
    n = len(groups[0])
    blocks = architecture.blocks(lm.model)
    rows, template = prepare(lm, blocks, layer, groups, config.gain)
    origin = rows.hidden[:n, 0].float()
    size = origin.norm(dim=-1, keepdim=True)
    rate = config.rate * size / origin.shape[1] ** 0.5
    shift = torch.zeros_like(origin)
    mean, square = torch.zeros_like(shift), torch.zeros_like(shift)
    loss = size.new_full((n,), torch.inf)
    reference = size.new_full((n, lm.model.get_output_embeddings().weight.shape[0]), torch.nan)
    active = torch.ones_like(loss, dtype=torch.bool)
    parts = rows.buckets(active)
    with starting_after(blocks, layer, template) as injected:
        for step in range(1, config.steps + 1):
            nll, gradient = torch.zeros_like(loss), torch.zeros_like(shift)
            for part in parts:
                more = score(lm.model, part, shift, injected, config.kl, reference)
                nll, gradient = nll + more[0], gradient + more[1]
            loss[active] = nll[active]
            done = active & (nll < config.enough)
            progress(int(done.sum()))
            active &= ~done
            # `loss` must be that of the shift that is returned, so no step follows the last pass.
            if step == config.steps or not active.any():
                break
            if done.any():
                parts = rows.buckets(active)
            gradient += 2 * config.decay * shift / size**2
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient.square()
            move = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-12)
            moved = shift - rate * move
            moved *= (config.clamp * size / moved.norm(dim=-1, keepdim=True)).clamp_max(1)
            shift = torch.where(active[:, None], moved, shift)
    progress(int(active.sum()))
    return TargetValues(origin + shift, loss)
