"""Edit requests: a prompt, the subject in it, and the target that is to follow the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from coachhook.errors import ContradictionError, RequestError

_SLOT = "{}"
_OPTIONAL = {"paraphrases", "locality", "truth", "aliases"}
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class LocalityPrompt:
    """A prompt about something else, and its answer, which the edit must not change.

    Both are stripped. Raises `RequestError` if either is empty or not text.
    """

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _text("locality prompt", self.prompt))
        object.__setattr__(self, "answer", _text("locality answer", self.answer))


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to change.

    prompt: contains the subject, or one `{}` in its place, which is filled with the subject.
    subject: what the fact is about.
    target: how the prompt is to continue after the edit.
    paraphrases: other prompts for the same fact; `{}` is filled here too.
    aliases: other names of the subject that are to call the fact up too (under the memory readout).
    locality: prompts whose answers must not change; (prompt, answer) pairs are accepted.
    truth: the answer that the target replaces, if known; evaluation compares their likelihoods. It
    is ignored when requests are compared for equality.

    Texts are stripped and lists become tuples. If the subject contains braces and is already in the
    prompt, any `{}` there is left as it is. Raises `RequestError` for fields of a wrong
    type, empty texts, more than one `{}`, or a subject that is not in the prompt.
    """

    prompt: str
    subject: str
    target: str
    paraphrases: tuple[str, ...] = ()
    aliases: tuple[str, ...] = field(default=(), kw_only=True)
    locality: tuple[LocalityPrompt, ...] = ()
    truth: str | None = field(default=None, compare=False)
    _start: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        about = f" (prompt {_shown(self.prompt)}, subject {_shown(self.subject)})"
        subject = _text("subject", self.subject, about)
        if subject == _SLOT:
            raise RequestError(f"the subject is only the placeholder {_SLOT}; name it{about}")
        prompt, start = _filled("prompt", _text("prompt", self.prompt, about), subject, about)
        if start < 0:
            raise RequestError(
                f"prompt does not contain the subject; write the subject or {_SLOT} in it{about}"
            )
        paraphrases = tuple(
            _filled("paraphrase", _text("paraphrase", item, about), subject, about)[0]
            for item in _items("paraphrases", self.paraphrases, about)
        )
        locality = tuple(
            _locality(item, about) for item in _items("locality", self.locality, about)
        )
        object.__setattr__(self, "prompt", prompt)
        object.__setattr__(self, "subject", subject)
        object.__setattr__(self, "target", _text("target", self.target, about))
        object.__setattr__(self, "paraphrases", paraphrases)
        object.__setattr__(self, "aliases", _aliases(self.aliases, subject, about))
        object.__setattr__(self, "locality", locality)
        if self.truth is not None:
            object.__setattr__(self, "truth", _text("truth", self.truth, about))
        object.__setattr__(self, "_start", start)

    @property
    def subject_span(self) -> tuple[int, int]:
        """The subject's position in `prompt`: (start, end) in characters, end excluded.

        Where the `{}` was, if there was one, else the subject's last occurrence.
        """
        return self._start, self._start + len(self.subject)

    @property
    def fact(self) -> tuple[str, str]:
        """(prompt, subject): the identity of the fact, whatever its target."""
        return self.prompt, self.subject

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON-ready values, which `from_dict` and `load_requests` can read."""
        start, end = self.subject_span
        prompt = self.prompt
        if start != prompt.rfind(self.subject):
            # A `{}` marks which of several occurrences is meant.
            prompt = prompt[:start] + _SLOT + prompt[end:]
        found: dict[str, Any] = {
            "prompt": prompt,
            "subject": self.subject,
            "target": self.target,
            "paraphrases": list(self.paraphrases),
            "locality": [{"prompt": item.prompt, "answer": item.answer} for item in self.locality],
        }
        if self.aliases:
            found["aliases"] = list(self.aliases)
        return found if self.truth is None else found | {"truth": self.truth}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EditRequest:
        """Read what `to_dict` wrote; all but prompt, subject and target may be left out.

        Raises `RequestError` for missing or unknown fields and for what the constructor refuses.
        """
        required = {"prompt", "subject", "target"}
        _check_fields("request", data, required, optional=_OPTIONAL)
        about = f" (prompt {_shown(data['prompt'])}, subject {_shown(data['subject'])})"
        locality = []
        for item in _items("locality", data.get("locality", ()), about):
            _check_fields("locality", item, {"prompt", "answer"})
            locality.append(_locality((item["prompt"], item["answer"]), about))
        return cls(
            prompt=data["prompt"],
            subject=data["subject"],
            target=data["target"],
            paraphrases=data.get("paraphrases", ()),
            locality=tuple(locality),
            truth=data.get("truth"),
            aliases=data.get("aliases", ()),
        )


def check_batch(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests without exact duplicates (same fact, same target): the first wins, order kept.

    Raises `ContradictionError` if one fact gets two targets, `RequestError` for an empty batch or
    anything but a sequence of requests.
    """
    if not isinstance(requests, Sequence) or not all(isinstance(r, EditRequest) for r in requests):
        raise RequestError("a batch is a list of EditRequest; wrap a single one in a list")
    if not requests:
        raise RequestError("the batch is empty; give at least one edit request")
    kept: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        first = kept.setdefault(request.fact, request)
        if first.target != request.target:
            raise ContradictionError(
                f"two requests for subject {_shown(request.subject)} contradict each other: "
                f"{_shown(first.prompt)} → {_shown(first.target)} and "
                f"{_shown(request.prompt)} → {_shown(request.target)}; keep one of them"
            )
    return list(kept.values())


def check_aliases(requests: Sequence[EditRequest], standing: Sequence[EditRequest]) -> None:
    """Raise `RequestError` for an alias of a request that names another subject: of another of the
    `requests`, or of a `standing` edit."""
    everyone = (*standing, *requests)
    # In any letters: an edit opens for its subject's name in upper and lower case as well.
    subjects = {request.subject.casefold(): request.subject for request in everyone}
    named: dict[str, str] = {}
    for request in everyone:
        for alias in request.aliases:
            named.setdefault(alias.casefold(), request.subject)
    for request in requests:
        own = request.subject.casefold()
        for alias in request.aliases:
            name = alias.casefold()
            for other in (subjects.get(name), named.get(name)):
                if other is not None and other.casefold() != own:
                    raise RequestError(
                        f"alias {_shown(alias)} of {_shown(request.subject)} names another "
                        f"subject, {_shown(other)}; leave it out, or use one subject for both"
                    )
    for request in requests:
        own = request.subject.casefold()
        if named.get(own, request.subject).casefold() != own:
            raise RequestError(
                f"subject {_shown(request.subject)} is an alias of {_shown(named[own])}, which is "
                "edited, too; use one subject for both"
            )


def _shown(value: object) -> str:
    """For messages: the repr of a text, shortened; the type of any other value."""
    if not isinstance(value, str):
        return f"<{type(value).__name__}>"
    text = repr(value[:_SHOWN_CHARACTERS])
    if len(value) <= _SHOWN_CHARACTERS and len(text) <= _SHOWN_CHARACTERS:
        return text
    return text[: _SHOWN_CHARACTERS - 1] + "…"


def _text(name: str, value: object, about: str = "") -> str:
    """`value` stripped. Raises `RequestError`, naming the field, if it is not text or empty."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be text, not {type(value).__name__}{about}")
    text = value.strip()
    if not text:
        raise RequestError(f"{name} is empty; give it at least one character{about}")
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON's \ud800 decodes to half a character, which no tokenizer or file accepts.
        raise RequestError(
            f"{name} {_shown(text)} has half of a surrogate pair; give whole characters{about}"
        ) from None
    return text


def _items(name: str, value: object, about: str) -> Sequence[Any]:
    """`value` if it is a list or tuple. A bare text would be iterated character by character."""
    if not isinstance(value, list | tuple):
        raise RequestError(f"{name} must be a list, not {type(value).__name__}{about}")
    return value


def _aliases(value: object, subject: str, about: str) -> tuple[str, ...]:
    found: list[str] = []
    for item in _items("aliases", value, about):
        alias = _text("alias", item, about)
        if alias == _SLOT:
            raise RequestError(f"an alias is only the placeholder {_SLOT}; name it{about}")
        if alias == subject or alias in found:
            raise RequestError(f"alias {_shown(alias)} is given twice; leave one out{about}")
        found.append(alias)
    return tuple(found)


def _filled(name: str, text: str, subject: str, about: str) -> tuple[str, int]:
    """`text` with `{}` replaced by the subject, and the subject's start in it (-1 if absent).

    Filling twice changes nothing: a filled text contains `{}` only if its subject has braces, and
    then `{}` counts as text.
    """
    slots = text.count(_SLOT)
    braces_are_text = subject in text and ("{" in subject or "}" in subject)
    if slots == 0 or braces_are_text:
        return text, text.rfind(subject)
    if slots > 1:
        raise RequestError(f"{name} has {slots} {_SLOT}; write it once, for the subject{about}")
    before, after = text.split(_SLOT)
    return before + subject + after, len(before)


def _locality(item: object, about: str) -> LocalityPrompt:
    if isinstance(item, LocalityPrompt):
        return item
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise RequestError(f"locality items must be (prompt, answer) pairs{about}")
    prompt, answer = item
    return LocalityPrompt(
        _text("locality prompt", prompt, about), _text("locality answer", answer, about)
    )


def _check_fields(
    name: str, data: object, required: AbstractSet[str], optional: AbstractSet[str] = frozenset()
) -> None:
    if not isinstance(data, Mapping):
        raise RequestError(f"{name} must be an object with fields, not {type(data).__name__}")
    missing = sorted(required - data.keys())
    if missing:
        raise RequestError(
            f"{name} lacks {', '.join(missing)}; it needs {', '.join(sorted(required))}"
        )
    unknown = [_shown(key) for key in data if key not in required | optional]
    if unknown:
        raise RequestError(
            f"{name} has unknown fields {', '.join(unknown)}; "
            f"known are {', '.join(sorted(required | optional))}"
        )
