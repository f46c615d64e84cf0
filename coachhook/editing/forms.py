"""The forms in which a subject is met: each group of texts gives one fingerprint, its mean key."""

from collections.abc import Sequence
from dataclasses import dataclass

from coachhook.config import MemoryConfig
from coachhook.facts.request import EditRequest
from coachhook.models.language_model import LanguageModel
from coachhook.models.tokens import Row, encode


@dataclass(frozen=True)
class Form:
    """Texts that end with a name. request: its number in the batch; alias: the name, if it is not
    the subject as the prompt has it."""

    request: int
    alias: str | None
    rows: list[Row]


def forms_of(
    lm: LanguageModel, requests: Sequence[EditRequest], config: MemoryConfig
) -> list[Form]:
    """Of each request: its bare prompt; the subject in mid-sentence, where something begins, and by
    itself at the start of a text, where the key of a short name is another; the subject in upper
    and lower case; and each alias like the subject."""
    found = []
    for number, request in enumerate(requests):
        end = request.subject_span[1]
        bare = encode(lm.tokenizer, request.prompt, subject_end=end)
        found.append(Form(number, None, [bare]))
        for texts in (config.contexts, config.starts, ("{}",)):
            found += _form(lm, number, None, request.subject, texts)
        written = {request.subject}
        for name in (request.subject.upper(), request.subject.lower(), *request.aliases):
            if name in written:
                continue
            written.add(name)
            alias = name if name in request.aliases else None
            found += _form(lm, number, alias, name, config.contexts)
            for texts in (config.starts, ("{}",)) if alias is not None else ():
                found += _form(lm, number, alias, name, texts)
    return found


def _form(
    lm: LanguageModel, number: int, alias: str | None, name: str, texts: Sequence[str]
) -> list[Form]:
    """One form, or none where the name is a first token everywhere, whose key all texts share."""
    rows = []
    for text in texts:
        before = text.split("{}")[0]
        row = encode(lm.tokenizer, before + name, subject_end=len(before + name))
        if row.subject > 0:
            rows.append(row)
    return [Form(number, alias, rows)] if rows else []


def neighbours_of(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[Row]:
    """Prompts whose subject is replaced by one that ends alike and begins as another's, up to that
    subject's last token."""
    subjects = [request.subject for request in requests]
    taken, rows = set(subjects), []
    for number, request in enumerate(requests):
        *own, last = request.subject.split(" ")
        others = (s.split(" ")[:-1] for s in [*subjects[number + 1 :], *subjects[:number]])
        other = next((words for words in others if words and words != own), None)
        if not own or other is None:
            continue
        name = " ".join([*other, last])
        if name not in taken:
            before = request.prompt[: request.subject_span[0]]
            rows.append(encode(lm.tokenizer, before + name, subject_end=len(before + name)))
    return rows
