"""The memory and time that editing under the memory readout will need. See `coachhook.plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from coachhook.config import EditConfig
from coachhook.facts.request import EditRequest
from coachhook.plan import Part, Plan, Sizes, edit_plan, planned, statistics_plan
from coachhook.statistics.measure import MOST_BACKGROUND
from coachhook.system.hardware import arithmetic_device, matmul_rate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Fingerprints of an edit whose request names no alias: bare, in three kinds of place, in two cases.
_FORMS = 6


def memory_plan(
    sizes: Sizes,
    config: EditConfig,
    tokenizer: PreTrainedTokenizerFast,
    requests: Sequence[EditRequest],
    batch_size: int,
    earlier: int = 0,
) -> Plan:
    """What editing `requests`, `batch_size` at a time, will need, statistics included; `config`
    names the blocks, and the folder already holds `earlier` edits."""
    gate, written = config.memory.gate_block, config.memory.write_blocks
    assert gate is not None
    assert written is not None
    hidden, edits = sizes.hidden, earlier + len(requests)
    device = arithmetic_device(config.inverse_device, sizes.device)
    # The keys are hidden states.
    narrow = replace(sizes, d_in=hidden)
    kept = min(config.statistics.tokens_for(hidden), MOST_BACKGROUND)
    rate = matmul_rate(device, torch.float64, hidden)
    rows = edits * len(written) * hidden
    marks = edits * (_FORMS + config.memory.rivals) * config.fingerprint_size * 4
    # A pass over the same texts as under the other readout, from the first write block on.
    other = {
        part.name: part
        for part in edit_plan(sizes, [written[0]], config, tokenizer, requests, batch_size).parts
    }
    return planned(
        sizes,
        [
            *statistics_plan(narrow, [gate], config.statistics).parts,
            Part(
                "factorising",
                str(device),
                hidden**2 * 16 + kept * hidden * 4,
                hidden**3 / rate,
                passing=True,
            ),
            other["target values"],
            other["writing"],
            Part("edits", "cpu", 2 * rows + marks + kept * config.fingerprint_size * 4),
            Part("differences", str(sizes.device), rows * sizes.itemsize + marks),
        ],
    )


def memory_calibration_plan(
    sizes: Sizes,
    gates: Sequence[int],
    config: EditConfig,
    tokenizer: PreTrainedTokenizerFast,
    probes: Sequence[EditRequest],
    trials: int,
) -> Plan:
    """What reading the keys of the blocks `gates` and `trials` edits of all probes will need;
    `config` names blocks that are written to."""
    reading = statistics_plan(replace(sizes, d_in=sizes.hidden), gates, config.statistics).parts
    one = memory_plan(sizes, config, tokenizer, probes, len(probes)).parts[len(reading) :]
    return planned(sizes, [*reading, *(replace(p, seconds=p.seconds * trials) for p in one)])
