"""Generation with one model: prefill and single steps, and the checks of its hooks."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from bench.harness.script import WrongResultError
from bench.harness.timing import Step, captured
from bench.inference.shapes import Synthetic

CHECKED_STEPS = 8
WARMUPS = 3


def random_prompt(model: Any, batch: int, length: int) -> Tensor:
    return torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)


def prefill(model: Any, prompt: Tensor, cache: Any = None) -> Tensor:
    """Logits `(b, vocab)` of the first new token."""
    output = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits[:, -1]
    return logits


class Session:
    """Greedy decoding after `prompt`; on a GPU with a static cache, so that a CUDA graph works."""

    def __init__(self, model: Any, prompt: Tensor, steps: int) -> None:
        self.model = model
        if prompt.is_cuda:
            capacity = prompt.shape[1] + steps + CHECKED_STEPS + WARMUPS
            self.cache: Any = StaticCache(config=model.config, max_cache_len=capacity)
        else:
            self.cache = DynamicCache(config=model.config)
        self.logits = prefill(model, prompt, self.cache)
        self.token = self.logits.argmax(-1, keepdim=True)

    def step(self) -> None:
        self.logits.copy_(prefill(self.model, self.token, self.cache))
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def captured(self) -> Step:
        return captured([self.step], self.model.device, WARMUPS)


def tolerance(model: Any, hooks: Synthetic) -> float:
    """Relative error of the logits that may come from the order of sums.

    On a CPU a closed hook's output is that of its base, bit for bit, and a memory's everywhere. On
    a GPU the fused kernel of a hooked layer sums in another order: one rounding in the attention
    and one in the FFN of each block is allowed.
    """
    if hooks.exact or model.device.type == "cpu":
        return 0.0
    return float(torch.finfo(model.dtype).eps * (2 * model.config.num_hidden_layers) ** 0.5)


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """`‖found − wanted‖ / ‖wanted‖` along the last dimension."""
    found, wanted = found.float(), wanted.float()
    ratio: Tensor = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return ratio


def check(model: Any, hooks: Synthetic, prompt: Tensor) -> None:
    """Raise WrongResultError unless closed hooks leave the logits unchanged and an open one does
    not.

    prompt `(1, length)`.
    """
    unhooked = model(input_ids=prompt).logits
    with hooks.attached():
        closed = model(input_ids=prompt).logits
    error = float(distance(closed, unhooked).max())
    if not error <= tolerance(model, hooks):
        raise WrongResultError(f"with every gate closed the logits are off by {error:.3g}")
    check_open(model, hooks, prompt, closed)


def check_open(model: Any, hooks: Synthetic, prompt: Tensor, closed: Tensor) -> None:
    """Open the last gate for one token and raise WrongResultError unless its logits change and
    those before it do not."""
    gate = hooks.opening()
    kept: list[Tensor] = []
    handle = gate.site.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with hooks.attached():
        model(input_ids=prompt)
        handle.remove()
        keys = kept[0][0]
        before = {name: part.clone() for name, part in gate.parts.items()}
        if "fingerprints" in before:
            print_of_last = before["projection"] @ keys[-1] - before["offset"]
            gate.parts["fingerprints"][0] = print_of_last / print_of_last.norm()
        scores = gate.read(keys).score
        highest, second = scores.topk(2).values
        token = int(scores.argmax())
        gate.threshold.copy_((highest + second) / 2)
        opened = model(input_ids=prompt).logits
        for name, part in gate.parts.items():
            part.copy_(before[name])
    changed = distance(opened, closed)[0] > tolerance(model, hooks)
    if not changed[token] or changed[:token].any():
        raise WrongResultError(
            f"with the gate of token {token} open the logits changed at "
            f"{changed.nonzero().flatten().tolist()}"
        )


def check_steps(
    model: Any, hooks: Synthetic, steps: dict[str, Step], sessions: dict[str, Session]
) -> int:
    """Decode side by side until the tokens differ, for at most `CHECKED_STEPS`; raise
    WrongResultError if the logits differ before.

    Returns the number of steps before the tokens differed.
    """
    unhooked, hooked = sessions["unhooked"], sessions["hooked"]
    for i in range(CHECKED_STEPS):
        if not torch.equal(unhooked.token, hooked.token):
            return i
        for step in steps.values():
            step()
        error = float(distance(hooked.logits, unhooked.logits).max())
        if not error <= tolerance(model, hooks):
            raise WrongResultError(f"decoding step {i + 1}: the logits are off by {error:.3g}")
    return CHECKED_STEPS
