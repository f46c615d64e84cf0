"""Target values: the hidden state at the subject's last token that makes the target likely.

Adam on a shift of the last hooked block's output (paper section 3; MEMIT's recipe), many requests
at once; `value_rows` computes what does not depend on the shift.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Shifts:
    """origin float32 `(n, d)`: output of the first of w blocks at each subject; shift float32
    `(n, w, d)`: what is to be added there and after the later blocks; loss float32 `(n,)`: mean
    negative log-likelihood (nats) of the targets then."""

    origin: Tensor
    shift: Tensor
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
    """Optimise the value of every request at the output of block `layer`. See `optimise_shifts`."""
    each = range(len(requests))
    found = optimise_shifts(lm, architecture, (layer,), requests, each, config, progress, processes)
    return TargetValues(found.origin + found.shift[:, 0], found.loss)


def optimise_shifts(
    lm: LanguageModel,
    architecture: Architecture,
    layers: Sequence[int],
    requests: Sequence[EditRequest],
    joined: Sequence[int],
    config: ValueConfig,
    progress: Callable[[int], None] = lambda _: None,
    processes: Processes = ALONE,
) -> Shifts:
    """Optimise what to add to the outputs of the blocks `layers` at the subject of every request.

    joined: a number for each request, from 0 without gaps; requests of the same number share their
    shift, which is made to say all their targets. Runs as many requests at once as `config.tokens`
    allows, and half as many when out of memory. `progress` is called with the number of requests
    just done. With several `processes` this is a collective: each optimises its share, and all
    return every shift. Raises `NotEnoughMemoryError` if what is joined does not fit, `ModelError`
    for a shift that is not finite.
    """
    check_attention(architecture.blocks(lm.model))
    groups = contexts_of(lm.tokenizer, requests, config)
    members: list[list[int]] = [[] for _ in range(max(joined) + 1)]
    for request, number in enumerate(joined):
        members[number].append(request)
    # Tokens in the rows of each that shares a shift, padded to the longest.
    longest = [max(len(group[i].ids) for group in groups) for i in range(len(requests))]
    sizes = [len(groups) * len(of) * max(longest[i] for i in of) for of in members]
    # Sorted by length, so that little of a pass is padding.
    order = sorted(range(len(members)), key=lambda i: sizes[i])
    waiting = [order[place] for place in processes.share(len(members))]
    optimised: dict[str, Tensor] = {}

    def together(chosen: Sequence[int], tell: Callable[[int], None]) -> Shifts:
        picked = [request for number in chosen for request in members[number]]
        shared = [place for place, number in enumerate(chosen) for _ in members[number]]
        rows = [[group[i] for i in picked] for group in groups]
        return _together(lm, architecture, layers, config, rows, shared, tell)

    with eval_mode(lm.model), torch.no_grad():
        window = getattr(lm.model.config.get_text_config(), "sliding_window", None)
        for chosen, found in _in_groups(
            together, len(groups), sizes, waiting, config.tokens, window, progress
        ):
            picked = [request for number in chosen for request in members[number]]
            pairs = zip(picked, found.origin, found.shift, found.loss, strict=True)
            for i, origin, shift, loss in pairs:
                if not (origin.isfinite().all() and shift.isfinite().all()):
                    raise ModelError(
                        f"the target value of {requests[i].prompt[:80]!r} is not finite; the model "
                        "gives numbers that its dtype does not hold: load it in a wider one"
                    )
                optimised[f"origin.{i}"], optimised[f"shift.{i}"] = origin.clone(), shift.clone()
                optimised[f"loss.{i}"] = loss.clone()
    optimised = processes.gather(optimised)

    def stacked(name: str) -> Tensor:
        return torch.stack([optimised[f"{name}.{i}"] for i in range(len(requests))]).to(lm.device)

    return Shifts(stacked("origin"), stacked("shift"), stacked("loss"))


def check_attention(blocks: nn.ModuleList) -> None:
    """Raise `ModelError` for state-space blocks, whose states cannot be kept as keys and values."""
    for number, block in enumerate(blocks):
        # What all of their kinds have, and no block of attention.
        if any(isinstance(module, nn.Conv1d) for module in block.modules()):
            raise ModelError(
                f"block {number} is a state-space block ({type(block).__name__}); target values "
                "are optimised in models of attention alone"
            )


def _in_groups(
    together: Callable[[Sequence[int], Callable[[int], None]], Shifts],
    n_texts: int,
    sizes: Sequence[int],
    waiting: Sequence[int],
    tokens: int,
    window: int | None,
    progress: Callable[[int], None],
) -> Iterator[tuple[Sequence[int], Shifts]]:
    """The shifts `waiting` (numbers, in ascending size), a group at a time.

    together: optimises those of one group. n_texts: of each request. tokens: most in one group;
    reduced when out of memory. window: width of the model's sliding attention window, if any.
    """
    while waiting:
        chosen = waiting[: _how_many([sizes[i] for i in waiting], tokens)]
        # Padding between tokens would use up a sliding window; a single request has no padding.
        if window is not None and 2 * sizes[chosen[-1]] // n_texts > window:
            chosen = waiting[:1]
        done = 0

        def tell(more: int) -> None:
            nonlocal done
            done += more
            progress(more)

        try:
            values = together(chosen, tell)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            progress(-done)
            if len(chosen) == 1:
                raise NotEnoughMemoryError(
                    f"memory does not hold the {sizes[chosen[0]]} tokens of one edit in "
                    f"{n_texts} contexts beside the model; give fewer contexts "
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
    layers: Sequence[int],
    config: ValueConfig,
    groups: Sequence[Sequence[Row]],
    joined: Sequence[int],
    progress: Callable[[int], None],
) -> Shifts:
    """The shifts of n requests; each drops out of the passes once its targets are likely."""
    n, layer = len(groups[0]), layers[0]
    blocks = architecture.blocks(lm.model)
    rows, template = prepare(lm, blocks, layer, groups, config.gain)
    origin = rows.hidden[:n, 0].float()
    of = torch.tensor(joined, device=origin.device)
    n_shifts = max(joined) + 1
    # Of several subjects' states, the smallest sets the step and the clamp.
    size = origin.new_full((n_shifts,), torch.inf)
    size = size.scatter_reduce(0, of, origin.norm(dim=-1), "amin")[:, None, None]
    rate = config.rate * size / origin.shape[1] ** 0.5
    shift = origin.new_zeros(n_shifts, len(layers), origin.shape[1])
    mean, square = torch.zeros_like(shift), torch.zeros_like(shift)
    loss = origin.new_full((n,), torch.inf)
    reference = origin.new_full((n, lm.model.get_output_embeddings().weight.shape[0]), torch.nan)
    # By request: the passes that it needs end with the last of those it shares its shift with.
    active = torch.ones_like(loss, dtype=torch.bool)
    parts = rows.buckets(active)
    with starting_after(blocks, layer, template, layers[1:]) as injected:
        for step in range(1, config.steps + 1):
            nll, gradient = torch.zeros_like(loss), torch.zeros_like(shift)
            for part in parts:
                more = score(lm.model, part, shift[of], injected, config.kl, reference)
                nll, gradient = nll + more[0], gradient.index_add(0, of, more[1])
            loss[active] = nll[active]
            unmet = torch.zeros(n_shifts, device=of.device).index_add(
                0, of, (~(loss < config.enough)).float()
            )
            done = active & (unmet[of] == 0)
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
            norm = moved.flatten(1).norm(dim=-1)[:, None, None]
            moved *= (config.clamp * size / norm).clamp_max(1)
            going_on = torch.zeros(n_shifts, dtype=torch.bool, device=of.device)
            going_on[of[active]] = True
            shift = torch.where(going_on[:, None, None], moved, shift)
    progress(int(active.sum()))
    return Shifts(origin, shift[of], loss)
