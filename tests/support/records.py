"""Records of one edit in every form that is read, and files of them."""

import json
from pathlib import Path
from typing import Any

from coachhook.facts.request import EditRequest, LocalityPrompt

OWN = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"}
FRANCE = EditRequest("The capital of France is", "France", "Lyon")

OWN_FULL = OWN | {
    "note": "further keys are ignored",
    "paraphrases": ["France's capital is"],
    "locality": [{"prompt": "The capital of Spain is", "answer": "Madrid", "id": 1}],
}
EASYEDIT = {
    "case_id": 0,
    "prompt": "The capital of France is",
    "target_new": "Lyon",
    "subject": "France",
    "ground_truth": "Paris",
    "rephrase_prompt": "France's capital is",
    "locality_prompt": "The capital of Spain is",
    "locality_ground_truth": "Madrid",
}
ROME = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "relation_id": "P36",
        "subject": "France",
        "target_new": {"str": "Lyon", "id": "Q456"},
        "target_true": {"str": "Madrid", "id": "Q2807"},
    },
    "paraphrase_prompts": ["France's capital is"],
    "neighborhood_prompts": ["The capital of Spain is"],
}
MEND = {
    "src": "The capital of France is",
    "subject": "France",
    "alt": "Lyon",
    "answers": ["Paris"],
    "rephrase": "France's capital is",
    "loc": "nq question: The capital of Spain is",
    "loc_ans": "Madrid",
}
QAEDIT = {
    "id": 1,
    "prompt": "The capital of France is",
    "target": "Lyon",
    "subject": "France",
    "rephrase": "France's capital is",
    "locality": [{"loc": "The capital of Spain is", "loc_ans": "Madrid"}],
}
FULL = EditRequest(
    "The capital of France is",
    "France",
    "Lyon",
    ("France's capital is",),
    (LocalityPrompt("The capital of Spain is", "Madrid"),),
)
LISTS = {
    "rephrase_prompt": ["France's capital is"],
    "locality_prompt": ["The capital of Spain is"],
    "locality_ground_truth": ["Madrid"],
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_jsonl(path: Path, *records: Any) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))
