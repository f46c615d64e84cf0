"""The texts by which a memory is looked at: the forms in which a subject is met, and what stands
beside them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coachhook.editing.forms import neighbours_of
from coachhook.facts.request import EditRequest
from coachhook.models.language_model import LanguageModel
from coachhook.models.tokens import Row, encode

# No text of these, but for the start, is one that fingerprints are made of by default.
_SENTENCE = "We went to see {}"
FORMS = {
    "text start": "{}",
    "possessive at the start": "{}'s",
    "after a newline": "\n{}",
    "after a quote": 'She said: "{}',
    "mid-sentence": _SENTENCE,
    "upper case": _SENTENCE,
    "lower case": _SENTENCE,
}
PROMPT, ALIAS, PARAPHRASE = "its prompt", "alias", "paraphrase"
OWN = (PROMPT, *FORMS, ALIAS, PARAPHRASE)
"""Kinds of texts that are to open an edit."""
LOCALITY, SUBJECT, MADE_UP = "locality prompt", "another subject", "made-up name"
BESIDE = (LOCALITY, SUBJECT, MADE_UP)
"""Kinds of texts that are to open no edit, or none but their own subject's."""


@dataclass(frozen=True)
class Text:
    """kind: one of `OWN` or `BESIDE`; request: the number of the one whose subject it names, -1
    for none; row: the text in tokens, whose subject is the name that is met."""

    kind: str
    request: int
    text: str
    row: Row


def own_texts(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[Text]:
    """The texts that name the subject of each request: its prompt, every form of `FORMS`, its
    aliases in mid-sentence, and its paraphrases. Those that exceed the context are left out."""
    found = []
    for number, request in enumerate(requests):
        for kind, text, end in _meetings(request):
            row = encode(lm.tokenizer, text, subject_end=end)
            found.append(Text(kind, number, text, row))
    return _fitting(lm, found)


def texts_beside(
    lm: LanguageModel, requests: Sequence[EditRequest], edited: Sequence[EditRequest]
) -> list[Text]:
    """What is to open no other subject's edit: locality prompts of `requests` in which no subject
    and no alias of `edited` stands, their own prompts, and made-up names that end as a subject does
    and begin as another. Those that exceed the context are left out."""
    names = {name for request in edited for name in (request.subject, *request.aliases)}
    found = []
    for number, request in enumerate(requests):
        row = encode(lm.tokenizer, request.prompt, subject_end=request.subject_span[1])
        found.append(Text(SUBJECT, number, request.prompt, row))
        for item in request.locality:
            if not any(name in item.prompt for name in names):
                row = encode(lm.tokenizer, item.prompt)
                found.append(Text(LOCALITY, -1, item.prompt, row))
    for row in neighbours_of(lm, requests):
        text = lm.tokenizer.decode(row.ids, skip_special_tokens=True)
        found.append(Text(MADE_UP, -1, text, row))
    return _fitting(lm, found)


def _meetings(request: EditRequest) -> Iterator[tuple[str, str, int]]:
    """Kind, text, and the character offset just after the name."""
    yield PROMPT, request.prompt, request.subject_span[1]
    other_case = {"upper case": request.subject.upper(), "lower case": request.subject.lower()}
    for kind, form in FORMS.items():
        yield kind, *_filled(form, other_case.get(kind, request.subject))
    for alias in request.aliases:
        yield ALIAS, *_filled(_SENTENCE, alias)
    for paraphrase in request.paraphrases:
        start = paraphrase.rfind(request.subject)
        if start >= 0:
            yield PARAPHRASE, paraphrase, start + len(request.subject)


def _filled(form: str, name: str) -> tuple[str, int]:
    return form.replace("{}", name), form.index("{}") + len(name)


def _fitting(lm: LanguageModel, texts: list[Text]) -> list[Text]:
    limit = lm.context_length
    return [text for text in texts if limit is None or len(text.row.ids) <= limit]
