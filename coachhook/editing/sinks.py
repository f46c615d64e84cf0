"""Refusing requests whose subject is an attention sink, before any other work."""

from collections.abc import Mapping, Sequence

from coachhook.editing.contexts import Contexts
from coachhook.editing.layer_writer import KeySketches
from coachhook.hookset import HookSet
from coachhook.journal.journal import EditRecord, Verdict
from coachhook.models.language_model import LanguageModel

SINK_REASON = (
    "the subject is the first token of the prompt, where every text has the same key (an attention "
    "sink); let other words precede it"
)


def refuse_sinks(
    lm: LanguageModel,
    hooks: HookSet,
    writers: Mapping[int, KeySketches],
    edits: Sequence[EditRecord],
) -> None:
    """Refuse edits whose subject is the first token and has the key that first tokens share."""
    contexts = Contexts.of(lm, [edit.request for edit in edits], ())
    starts = (contexts.padded.subject == 0).nonzero().squeeze(-1).tolist()
    if not starts:
        return
    modules = hooks.modules(lm.model)
    keys, _ = contexts.read(lm.model, list(modules.values()), hooks.config.values.tokens)
    for layer, at_layer in zip(modules, keys, strict=True):
        marks = writers[layer].fingerprint(at_layer[starts].float())
        sinks = writers[layer].sinks(marks).tolist()
        for i, sink in zip(starts, sinks, strict=True):
            if sink:
                edits[i].verdict, edits[i].reason = Verdict.REFUSED, SINK_REASON
