"""The memory and time that a run will need, part by part, checked before it starts.

Moments, inverses and background keys are counted exactly. Activations are estimated, within a
factor of two, from rules of thumb for the number of values kept per token.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coachhook.config import EditConfig
from coachhook.errors import NotEnoughMemoryError
from coachhook.facts.request import EditRequest
from coachhook.models import embedded
from coachhook.models.architecture import Architecture
from coachhook.models.passes import input_device
from coachhook.models.placement import parameters_of
from coachhook.models.tokens import encode_request
from coachhook.statistics.measure import FIRST_WORDS, MOST_BACKGROUND
from coachhook.statistics.source import StatisticsSource
from coachhook.statistics.text import SEQUENCE_LENGTH, SHARD_SEQUENCES
from coachhook.system.hardware import arithmetic_device, free_bytes, matmul_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_HOST = torch.device("cpu")
# Bytes for each of a layer's d_in² numbers: of the float32 moment, and of one inverse triangle.
_MOMENT, _INVERSE = 4, {"float64": 4, "float32": 2}
# The same of the float64 matrix and its factor, which exist only while the inverse is made.
_SCRATCH = 16
# Bytes of a number in a batch's Gram matrix, its factors and its products with the inverse.
_NUMBER = 8
# For each token of a block, vectors of width `hidden` and of width `d_in` that are kept for the
# backward pass, or are alive at once in a pass without one.
_KEPT_HIDDEN, _KEPT_INNER, _ALIVE_HIDDEN, _ALIVE_INNER = 8, 4, 8, 3
# Norms, attention and Python make a pass slower than one matrix product of as many operations.
_EFFICIENCY = 0.5
_NEW_TOKENS = 5
_SAMPLE = 64
# Most layers that calibration tries together.
MOST_HOOKED = 5

_ADVICE = {
    "moments": "hook fewer layers",
    "inverses": "hook fewer layers",
    "background keys": "hook fewer layers, or read fewer tokens of text",
    "ordinary text": "hook fewer layers",
    "factorising": "hook fewer layers",
    "target values": "lower ValueConfig.tokens, or use a smaller batch",
    "solving": "use a smaller batch",
    "writing": "lower ValueConfig.tokens, or use a smaller batch",
    "edits": "edit fewer facts into one folder",
    "differences": "hook fewer layers",
    "model weights": "use a machine with more memory, or a smaller model",
}


@dataclass(frozen=True)
class Part:
    """One thing that a run needs.

    n_bytes: memory on `device`. seconds: upper estimate of its time. passing: whether the memory is
    free again before the next passing part; otherwise it is held until the end.
    """

    name: str
    device: str
    n_bytes: int
    seconds: float = 0.0
    passing: bool = False


@dataclass(frozen=True)
class Plan:
    """The parts of a run. in_place: bytes of model weights already on each device; free: bytes
    still free there."""

    parts: Sequence[Part]
    in_place: dict[str, int] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=dict)

    def needed(self, device: str) -> int:
        """Peak bytes that the run will use on `device`, on top of what is in place."""
        here = [part for part in self.parts if part.device == device]
        staying = sum(part.n_bytes for part in here if not part.passing)
        return staying + max((part.n_bytes for part in here if part.passing), default=0)

    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    def check(self) -> Plan:
        """Raise `NotEnoughMemoryError`, with the arithmetic, if the plan cannot fit; return it."""
        for device, free in self.free.items():
            needed = self.needed(device)
            if needed <= free:
                continue
            here = [part for part in self.parts if part.device == device]
            passing = [part for part in here if part.passing]
            counted = [part for part in here if not part.passing]
            counted += [max(passing, key=lambda part: part.n_bytes)] if passing else []
            counted.sort(key=lambda part: -part.n_bytes)
            terms = " + ".join(f"{gigabytes(p.n_bytes)} {p.name}" for p in counted)
            beside = self.in_place.get(device, 0)
            weights = f", beside the model's {gigabytes(beside)}" if beside else ""
            raise NotEnoughMemoryError(
                f"this needs {gigabytes(needed)} GB on {device}{weights} = {terms}, "
                f"and {gigabytes(free)} GB is free; {_ADVICE[counted[0].name]}"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "parts": [asdict(part) for part in self.parts],
            "weights_bytes": self.in_place,
            "free_bytes": self.free,
            "needed_bytes": {device: self.needed(device) for device in self.free},
            "seconds": self.seconds(),
        }


def gigabytes(n_bytes: int) -> str:
    """Bytes in units of 10⁹, for people: one decimal, below 1 two significant figures."""
    amount = n_bytes / 1e9
    return f"{amount:.1f}" if amount >= 1 else f"{amount:.2g}"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that decide the cost of its passes.

    parameters: number in the whole model, block_parameters: in one block. heads_width: width of all
    query heads together; cache_width: of a token's keys and values in one block's KV cache.
    weights_bytes: of the weights and buffers that are in memory. itemsize: bytes of an activation.
    """

    blocks: int
    hidden: int
    d_in: int
    vocabulary: int
    parameters: int
    block_parameters: int
    heads_width: int
    cache_width: int
    weights_bytes: int
    itemsize: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls, model: PreTrainedModel, architecture: Architecture, site: str = "down_projection"
    ) -> Sizes:
        """The sizes of `model`, which may be partly offloaded or on the meta device. site: whose
        inputs are the keys, see `Architecture.width`."""
        config = model.config.get_text_config()
        blocks = architecture.blocks(model)
        hidden, heads = config.hidden_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or hidden // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        parameters = parameters_of(model)
        in_memory = [t for t in (*parameters, *model.buffers()) if not t.is_meta]
        return cls(
            blocks=len(blocks),
            hidden=hidden,
            d_in=architecture.width(model, 0, site),
            vocabulary=config.vocab_size,
            parameters=sum(p.numel() for p in parameters),
            block_parameters=sum(p.numel() for p in blocks.parameters()) // len(blocks),
            heads_width=heads * head,
            cache_width=2 * groups * head,
            weights_bytes=sum(t.numel() * t.element_size() for t in in_memory),
            itemsize=model.dtype.itemsize,
            dtype=model.dtype,
            device=input_device(model),
        )

    def seconds(self, operations: float) -> float:
        """Time of a pass with this many floating-point operations."""
        return operations / (_EFFICIENCY * matmul_rate(self.device, self.dtype, self.hidden))

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the KV cache of `tokens`."""
        return tokens * self.blocks * self.cache_width * self.itemsize

    def pass_bytes(self, tokens: int) -> int:
        """Bytes alive at once in a pass over `tokens` that keeps nothing for a backward pass."""
        width = _ALIVE_HIDDEN * self.hidden + _ALIVE_INNER * self.d_in
        return tokens * width * self.itemsize


def statistics_plan(sizes: Sizes, layers: Sequence[int], source: StatisticsSource) -> Plan:
    """What `key_statistics` will need if its result is not cached."""
    tokens, d_in, n = source.tokens_for(sizes.d_in), sizes.d_in, len(layers)
    kept = min(tokens, MOST_BACKGROUND)
    at_once = min(SHARD_SEQUENCES, -(-tokens // SEQUENCE_LENGTH))
    batch = at_once * SEQUENCE_LENGTH
    sampling = sizes.cache_bytes(batch) + at_once * sizes.vocabulary * 4 * 3
    reading = sizes.pass_bytes(batch) + n * batch * d_in * sizes.itemsize
    sampled = 0.0 if source.path else 2.0 * tokens * sizes.parameters
    read = 2.0 * tokens * (layers[-1] + 1) * sizes.block_parameters + n * tokens * d_in**2
    background = n * (kept + FIRST_WORDS) * d_in * 2
    # Joining the pieces of the background keys holds them twice.
    working = max(sampling, reading) + (background if sizes.device == _HOST else 0)
    parts = [
        Part("moments", "cpu", n * d_in**2 * _MOMENT),
        Part("background keys", "cpu", background),
        Part(
            "ordinary text",
            str(sizes.device),
            working + (0 if sizes.device == _HOST else n * d_in**2 * _MOMENT),
            sizes.seconds(sampled + read),
            passing=True,
        ),
    ]
    return planned(sizes, parts)


def edit_plan(
    sizes: Sizes,
    layers: Sequence[int],
    config: EditConfig,
    tokenizer: PreTrainedTokenizerFast,
    requests: Sequence[EditRequest],
    batch_size: int,
    earlier: int = 0,
) -> Plan:
    """What editing `requests` into `layers`, `batch_size` at a time, will need, statistics
    included; the folder already holds `earlier` edits."""
    n, d_in, hidden, contexts = len(layers), sizes.d_in, sizes.hidden, len(config.values.contexts)
    edits, batch = earlier + len(requests), min(batch_size, len(requests))
    device = arithmetic_device(config.inverse_device, sizes.device)
    kept = min(config.statistics.tokens_for(d_in), MOST_BACKGROUND)
    rate = matmul_rate(device, torch.float64, d_in)
    texts = _Texts.of(tokenizer, requests, config, batch)
    sketches = kept * config.fingerprint_size * 4
    # Two fingerprints for each edit; residuals, solutions and keys of the batch under way.
    journal = 8 * edits * config.fingerprint_size + 4 * batch * (hidden + (2 + contexts) * d_in)
    delta = min(edits * (d_in + hidden), d_in * hidden) * sizes.itemsize
    # For each hooked layer, and for the verdict, a pass up to the last one; then decoding.
    rows, width = batch * (1 + contexts), texts.left + texts.right
    at_once = min(rows * width, max(width, config.values.tokens))
    passes = 2.0 * rows * width * (n + 1) * (layers[-1] + 1) * sizes.block_parameters
    answers = 2.0 * batch * (width + _NEW_TOKENS) * sizes.parameters
    solving = n * 8.0 * d_in**2 * rows
    batches = -(-len(requests) // batch)
    inverse = _INVERSE[config.inverse_dtype]
    seconds = batches * (sizes.seconds(passes + answers) + solving / rate)
    return planned(
        sizes,
        [
            *statistics_plan(sizes, layers, config.statistics).parts,
            # The factor and the inverse are computed twice: for the sketches and for the writers.
            Part(
                "inverses", str(device), n * (d_in**2 * inverse + sketches), 2 * n * d_in**3 / rate
            ),
            Part("factorising", str(device), d_in**2 * _SCRATCH + kept * d_in * 4, passing=True),
            _values_part(sizes, layers[-1], config, texts, batch, batches),
            Part("solving", str(device), _NUMBER * rows * (3 * rows + 4 * d_in), passing=True),
            Part("writing", str(sizes.device), sizes.pass_bytes(at_once), seconds, True),
            Part("edits", "cpu", n * journal),
            Part("differences", str(sizes.device), n * delta),
        ],
    )


def calibration_plan(
    sizes: Sizes,
    layers: Sequence[int],
    source: StatisticsSource,
    tokenizer: PreTrainedTokenizerFast,
    probes: Sequence[EditRequest],
    trials: int,
) -> Plan:
    """What reading the keys of `layers` and `trials` edits of all probes will need."""
    config = EditConfig(readout="delta", statistics=source)
    reading = statistics_plan(sizes, layers, source)
    one = edit_plan(sizes, layers[-MOST_HOOKED:], config, tokenizer, probes, len(probes))
    trial = [
        replace(part, seconds=part.seconds * trials) for part in one.parts[len(reading.parts) :]
    ]
    return planned(sizes, [*reading.parts, *trial])


@dataclass(frozen=True)
class _Texts:
    """Sizes of a batch's rows. left, right: most tokens before the subject's last token, and from
    it on; targets: mean number of target tokens."""

    left: int
    right: int
    targets: float

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerFast,
        requests: Sequence[EditRequest],
        config: EditConfig,
        batch: int,
    ) -> _Texts:
        some = requests[:: -(-len(requests) // _SAMPLE)]
        rows = [
            encode_request(tokenizer, request, context)
            for request in some
            for context in ("{}", *config.values.contexts)
        ]
        return cls(
            left=max(row.subject for row in rows),
            right=max(len(row.ids) - row.subject for row in rows),
            targets=sum(row.n_target for row in rows) / len(rows),
        )


def _values_part(
    sizes: Sizes, layer: int, config: EditConfig, texts: _Texts, batch: int, batches: int
) -> Part:
    """Target values: one pass over whole rows, then steps over the tokens from the subject on."""
    texts_of_one = 2 + len(config.values.contexts)
    rows = batch * texts_of_one
    above = sizes.blocks - layer - 1
    width = texts.left + texts.right
    together = min(batch, max(1, config.values.tokens // (width * texts_of_one)))
    held = together * texts_of_one
    block = texts.right * (_KEPT_HIDDEN * sizes.hidden + _KEPT_INNER * sizes.d_in)
    # A step's own copy of the KV cache, and its keys and values repeated for every query head.
    block += width * (sizes.cache_width + 2 * sizes.heads_width)
    kept = sizes.cache_bytes(held * width) + held * above * block * sizes.itemsize
    # Logits, log-probabilities and gradient at target positions; reference log-probabilities.
    logits = (held * texts.targets * 3 + 4 * together) * sizes.vocabulary * 4
    first = 2.0 * rows * width * sizes.parameters
    head = rows * (texts.targets + 1) * sizes.hidden * sizes.vocabulary
    step = 4.0 * (rows * texts.right * above * sizes.block_parameters + head)
    seconds = batches * sizes.seconds(first + config.values.steps * step)
    return Part("target values", str(sizes.device), int(kept + logits), seconds, passing=True)


def check_weights(name: str) -> None:
    """Raise `NotEnoughMemoryError` if the weights of a model that is to be loaded will not fit.

    Anything else that is wrong with `name` is left to `load_model`; quantised models pass.
    """
    source = str(embedded.embedded_model() if name == embedded.NAME else name)
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError):
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored = getattr(config, "dtype", None) or torch.float32
    dtype = torch.float32 if device == _HOST else stored
    n_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    quantised = getattr(config, "quantization_config", None) is not None
    if not quantised:
        part = Part("model weights", str(device), n_bytes)
        Plan([part], {}, {str(device): _share(device)}).check()


def planned(sizes: Sizes, parts: list[Part]) -> Plan:
    names = {"cpu", str(sizes.device), *(part.device for part in parts)}
    free = {name: _share(torch.device(name)) for name in sorted(names)}
    return Plan(parts, {str(sizes.device): sizes.weights_bytes}, free)


def _share(device: torch.device) -> int:
    """Free bytes of `device` for this process; the processes of a job share the host's memory."""
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device == _HOST else 1
    return free_bytes(device) // n_here
