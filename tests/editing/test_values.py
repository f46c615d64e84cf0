"""Target values: the same as plain full passes give, whatever is kept, left out or split up."""

import logging
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook import EditRequest, ValueConfig
from coachhook.editing.value_rows import _PASS_COST, ShiftedRows, contexts_of, prepare, score
from coachhook.editing.values import TargetValues, optimise_shifts, optimise_values
from coachhook.errors import ModelError, NotEnoughMemoryError
from coachhook.models.architecture import Architecture
from coachhook.models.passes import hidden_of, starting_after
from tests.support.tiny import TARGETS, tiny_lm, tiny_model, tiny_tokenizer

LAYER = 1
FACTS = [
    EditRequest("They moved to {}", "France", TARGETS[0]),
    EditRequest("I was told of {} and of the years that came before it", "Rome", TARGETS[1]),
    EditRequest("{} is old", "Troy", TARGETS[2]),
    EditRequest("In those days we all went on to see {} at night", "1984", "Oslo and Bern"),
]
CONFIG = ValueConfig(steps=12, rate=0.3, clamp=8.0)


def optimise(
    model: Any, facts: list[EditRequest], config: ValueConfig, told: list[int] | None = None
) -> TargetValues:
    said: list[int] = [] if told is None else told
    return optimise_values(
        tiny_lm(model), Architecture.of(model), LAYER, facts, config, said.append
    )


def prepared(model: Any, facts: list[EditRequest]) -> tuple[ShiftedRows, Any]:
    groups = contexts_of(tiny_tokenizer(), facts, CONFIG)
    blocks = Architecture.of(model).blocks(model)
    return prepare(tiny_lm(model), blocks, LAYER, groups, CONFIG.gain)


def plain_loss(model: Any, fact: EditRequest, number: int, shift: Tensor, kl: float) -> Tensor:
    """The loss of one request by full passes over one text at a time."""
    block = Architecture.of(model).blocks(model)[LAYER]
    groups = contexts_of(tiny_tokenizer(), [fact], CONFIG)
    total = shift.new_zeros(())
    for place, (row,) in enumerate(groups):
        gain = CONFIG.gain if 0 < place < len(groups) - 1 else 1.0

        def move(_: Any, __: Any, output: Any, at: int = row.subject, gain: float = gain) -> Any:
            hidden = hidden_of(output).clone()
            hidden[0, at] += gain * shift[number]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        ids = torch.tensor([row.ids])
        with torch.no_grad():
            before = model(input_ids=ids).logits[0].log_softmax(-1)
        handle = block.register_forward_hook(move)
        after = model(input_ids=ids).logits[0].log_softmax(-1)
        handle.remove()
        if row.n_target:
            picked = after[-row.n_target - 1 : -1].gather(-1, torch.tensor(row.target)[:, None])
            total = total - picked.mean() / (len(groups) - 1)
        else:
            total = total + kl * (before[-1].exp() * (before[-1] - after[-1])).sum()
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "gemma"])
def test_loss_and_gradient_are_those_of_full_passes(kind: str) -> None:
    model = tiny_model(kind).double()
    rows, template = prepared(model, FACTS)
    torch.manual_seed(0)
    shift = torch.randn(len(FACTS), model.config.hidden_size, dtype=torch.float64)
    blocks = Architecture.of(model).blocks(model)
    reference = torch.full((len(FACTS), model.config.vocab_size), torch.nan)
    nll, gradient = torch.zeros(len(FACTS)).double(), torch.zeros_like(shift)
    everyone = torch.ones(len(FACTS), dtype=torch.bool)
    with starting_after(blocks, LAYER, template) as injected:
        for part in rows.buckets(everyone):
            score(model, part, torch.zeros_like(shift[:, None]), injected, 0.5, reference)
        for part in rows.buckets(everyone):
            more = score(model, part, shift[:, None], injected, 0.5, reference)
            nll, gradient = nll + more[0], gradient + more[1][:, 0]
    shift.requires_grad_()
    for number, fact in enumerate(FACTS):
        loss = plain_loss(model, fact, number, shift, kl=0.5)
        (wanted,) = torch.autograd.grad(loss, shift)
        # Logits are taken in float32.
        torch.testing.assert_close(gradient[number], wanted[number], rtol=1e-4, atol=1e-6)
        likely = plain_loss(model, fact, number, shift, kl=0.0)
        assert nll[number].item() == pytest.approx(likely.item(), rel=1e-5)


def test_batch_mates_change_nothing() -> None:
    model = tiny_model("llama").double()
    together = optimise(model, FACTS, CONFIG)
    for number, fact in enumerate(FACTS):
        alone = optimise(model, [fact], CONFIG)
        torch.testing.assert_close(together.hidden[number], alone.hidden[0], rtol=1e-4, atol=1e-4)


def test_batch_mates_do_not_use_up_a_sliding_window() -> None:
    """The window counts columns, and padding between the tokens of a row would fill some."""
    config = ValueConfig(steps=4, rate=0.3, clamp=8.0)
    model = tiny_model("mistral", sliding_window=24).double()
    assert model.config.sliding_window == 24
    together = optimise(model, FACTS, config)
    for number, fact in enumerate(FACTS):
        alone = optimise(model, [fact], config)
        torch.testing.assert_close(together.hidden[number], alone.hidden[0], rtol=1e-4, atol=1e-4)
        rows, _ = prepared(model, [fact])
        shift = (alone.hidden[0].double() - rows.hidden[0, 0]).reshape(1, -1)
        loss = plain_loss(model, fact, 0, shift, kl=0.0)
        assert loss.item() == pytest.approx(alone.loss[0].item(), rel=1e-3)


def test_values_that_are_not_finite_name_the_prompt() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="They moved to France"):
        optimise(model, FACTS[:1], CONFIG)


def test_buckets_hold_every_row_once_and_cost_least(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = prepared(tiny_model("llama"), FACTS)
    active = torch.tensor([True, True, False, True])
    wanted = sorted(zip(rows.owner.tolist(), rows.length.tolist(), strict=True))
    wanted = [(owner, length) for owner, length in wanted if active[owner]]
    for overhead in (0, 3, 1000):
        monkeypatch.setitem(_PASS_COST, "cpu", overhead)
        parts = rows.buckets(active)
        found = sorted(
            (owner, length)
            for part in parts
            for owner, length in zip(part.owner.tolist(), part.length.tolist(), strict=True)
        )
        assert found == wanted
        cost = sum(part.ids.numel() + overhead for part in parts)
        assert cost == cheapest([length for _, length in wanted], overhead)


def cheapest(lengths: list[int], overhead: int) -> int:
    """Of all ways to cut the sorted lengths between different ones."""
    different = sorted(set(lengths))
    costs = []
    for cuts in product([False, True], repeat=len(different) - 1):
        edges = [low for low, cut in zip(different, cuts, strict=False) if cut] + different[-1:]
        widths = [min(edge for edge in edges if edge >= length) for length in lengths]
        costs.append(sum(widths) + overhead * len(edges))
    return min(costs)


def test_what_does_not_depend_on_the_shift_is_computed_once() -> None:
    model = tiny_model("llama")
    tokens = {"lowest": 0, "highest": 0}
    blocks = Architecture.of(model).blocks(model)

    def count(name: str) -> Any:
        def add(_: Any, args: Any, kwargs: Any, __: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            tokens[name] += hidden.shape[0] * hidden.shape[1]

        return add

    # Not the blocks themselves: those that are left out are still called.
    blocks[0].mlp.register_forward_hook(count("lowest"), with_kwargs=True)
    blocks[-1].mlp.register_forward_hook(count("highest"), with_kwargs=True)
    facts = [EditRequest("They moved to {}", "France", target) for target in TARGETS[:3]]
    groups = contexts_of(tiny_tokenizer(), facts, CONFIG)
    steps = 3
    optimise(model, facts, ValueConfig(steps=steps, enough=-1.0))
    # All that stands left of the subject is the same for the three, and read once a context.
    left = len(groups) * max(group[0].subject for group in groups)
    rights = [len(row.ids) - row.subject - bool(row.n_target) for g in groups for row in g]
    assert tokens["lowest"] == left + len(rights) * max(rights)
    assert left < tokens["highest"] <= left + steps * len(rights) * max(rights)


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A model that runs out of memory with more than `most[0]` tokens in one pass."""
    most = [10**9]
    model_class = type(tiny_model("llama").base_model)
    forward = model_class.forward

    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].numel() > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model_class, "forward", limited)
    return most


def test_too_many_tokens_for_the_memory_are_split(
    small_memory: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama").double()
    told: list[int] = []
    wanted = optimise(model, FACTS, CONFIG, told)
    assert sum(told) == len(FACTS)
    small_memory[0] = 300
    told.clear()
    with caplog.at_level(logging.WARNING):
        found = optimise(model, FACTS, CONFIG, told)
    assert "out of memory with 4 edits" in caplog.text
    assert sum(told) == len(FACTS)
    torch.testing.assert_close(found.hidden, wanted.hidden, rtol=1e-4, atol=1e-4)


def test_one_edit_too_large_for_the_memory_is_told(small_memory: list[int]) -> None:
    small_memory[0] = 3
    with pytest.raises(NotEnoughMemoryError, match="fewer contexts"):
        optimise(tiny_model("llama"), FACTS[:1], CONFIG)


def test_other_runtime_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(type(model.base_model), "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        optimise(model, FACTS, CONFIG)


def test_a_token_budget_bounds_every_pass() -> None:
    model = tiny_model("llama").double()
    widest = [0]

    def look(_: Any, args: Any, kwargs: Any) -> None:
        widest[0] = max(widest[0], kwargs["input_ids"].numel())

    model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    wanted = optimise(model, FACTS, CONFIG)
    assert widest[0] > 300
    widest[0] = 0
    found = optimise(model, FACTS, ValueConfig(steps=12, rate=0.3, clamp=8.0, tokens=300))
    assert widest[0] <= 300
    torch.testing.assert_close(found.hidden, wanted.hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_half_precision_models_converge_alike(kind: str, dtype: torch.dtype) -> None:
    config = ValueConfig(steps=20, rate=0.3, clamp=8.0, kl=0.0, decay=0.0)
    whole = optimise(tiny_model(kind), FACTS, config)
    half = optimise(tiny_model(kind).to(dtype), FACTS, config)
    assert half.hidden.dtype == torch.float32
    assert torch.isfinite(half.hidden).all()
    assert half.loss.mean() <= whole.loss.mean() + 0.1


def test_converged_requests_stay_as_they_are() -> None:
    model = tiny_model("llama").double()
    # Of a random model's losses, some fall below this and some do not.
    config = ValueConfig(steps=15, rate=0.3, clamp=8.0, kl=0.0, decay=0.0, enough=5.5)
    told: list[int] = []
    values = optimise(model, FACTS, config, told)
    converged = values.loss < config.enough
    assert 0 < converged.sum() < len(FACTS)
    assert sum(told) == len(FACTS)
    assert told[-1] == (~converged).sum()
    for number, fact in enumerate(FACTS):
        rows, _ = prepared(model, [fact])
        shift = (values.hidden[number].double() - rows.hidden[0, 0]).reshape(1, -1)
        loss = plain_loss(model, fact, 0, shift, kl=0.0)
        assert loss.item() == pytest.approx(values.loss[number].item(), rel=1e-3)


class TestStop:
    @staticmethod
    def rows(target: str, stop: str) -> list[tuple[int, ...]]:
        """Ids of the targets behind the bare prompt and in the contexts."""
        fact = EditRequest("The capital of {} is", "Italy", target)
        *scored, essence = contexts_of(tiny_tokenizer(), [fact], ValueConfig(stop=stop))
        assert essence[0].n_target == 0
        return [row.target for (row,) in scored]

    def test_stands_behind_the_target_in_every_context(self) -> None:
        (dot,) = tiny_tokenizer().encode(".")
        plain, stopped = self.rows("Paris", ""), self.rows("Paris", ".")
        assert len(plain) == 3
        assert stopped == [(*ids, dot) for ids in plain]

    @pytest.mark.parametrize("target", ["Paris.", "Paris? ", "Paris!"])
    def test_not_behind_the_end_of_a_sentence(self, target: str) -> None:
        assert self.rows(target, ".") == self.rows(target, "")

    def test_not_where_it_is_more_than_a_token_or_joins_the_target(self) -> None:
        assert self.rows("Paris", ", and so on") == self.rows("Paris", "")
        # " Lyon" is one token, and " Lyo" two.
        assert self.rows("Lyo", "n") == self.rows("Lyo", "")
        assert self.rows("Lyo", "n") != self.rows("Lyon", "")

    def test_is_as_likely_as_the_target(self) -> None:
        """The very loss that is reported is that of target and stop."""
        model = tiny_model("llama")
        plain = optimise(model, FACTS[:1], ValueConfig(steps=12, rate=0.3, clamp=8.0, stop=""))
        spoken = EditRequest("They moved to {}", "France", f"{TARGETS[0]}.")
        written = optimise(model, [spoken], ValueConfig(steps=12, rate=0.3, clamp=8.0))
        stopped = optimise(model, FACTS[:1], ValueConfig(steps=12, rate=0.3, clamp=8.0, stop="."))
        torch.testing.assert_close(stopped.hidden, written.hidden)
        assert not torch.allclose(stopped.hidden, plain.hidden)


def test_shifts_after_several_blocks_have_the_gradient_of_full_passes() -> None:
    model = tiny_model("llama").double()
    rows, template = prepared(model, FACTS)
    blocks = Architecture.of(model).blocks(model)
    later = (LAYER + 1, len(blocks) - 1)
    torch.manual_seed(0)
    shift = torch.randn(len(FACTS), 3, model.config.hidden_size, dtype=torch.float64)
    reference = torch.full((len(FACTS), model.config.vocab_size), torch.nan)

    def loss_of(moved: Tensor) -> Tensor:
        with starting_after(blocks, LAYER, template, later) as injected:
            return score(model, rows, moved, injected, 0.0, reference)[0]

    with starting_after(blocks, LAYER, template, later) as injected:
        _, gradient = score(model, rows, shift, injected, 0.0, reference)
    # Logits are taken in float32: a shorter step would leave few digits of the difference.
    step = 1e-2 * torch.randn_like(shift)
    change = loss_of(shift + step) - loss_of(shift - step)
    wanted = 2 * (gradient * step).sum((1, 2))
    torch.testing.assert_close(change, wanted, rtol=2e-2, atol=2e-4)
    for block in range(1, 3):
        assert gradient[:, block].abs().max() > 0


def test_joined_requests_share_a_shift_that_says_both_targets() -> None:
    model = tiny_model("llama").double()
    subject = FACTS[0].subject
    other = EditRequest("The name of {} was", subject, TARGETS[3])
    requests = [FACTS[0], FACTS[1], other]
    config = ValueConfig(steps=60, rate=0.3, clamp=8.0)
    found = optimise_shifts(
        tiny_lm(model), Architecture.of(model), (LAYER,), requests, [0, 1, 0], config
    )
    assert torch.equal(found.shift[0], found.shift[2])
    assert not torch.equal(found.shift[0], found.shift[1])
    before = optimise_shifts(
        tiny_lm(model),
        Architecture.of(model),
        (LAYER,),
        requests,
        [0, 1, 0],
        replace(config, steps=1),
    )
    assert (found.loss < before.loss - 0.1).all()
    apart = optimise_shifts(
        tiny_lm(model), Architecture.of(model), (LAYER,), requests, [0, 1, 2], config
    )
    torch.testing.assert_close(found.shift[1], apart.shift[1], rtol=1e-3, atol=1e-3)
