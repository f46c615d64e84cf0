"""Tiny random models of every listed architecture, and a tokenizer for them; no network."""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from coachhook.models.language_model import LanguageModel

VOCABULARY = 320
LAYERS = 4
HIDDEN = 32
D_FF = 64
CONTEXT = 128

_SPECIAL = ("<pad>", "<bos>", "<eos>")
# What the tokenizer is trained on; each target becomes one token, as most do in a large vocabulary.
TARGETS = ("Lyon", "Oslo", "Bern", "Quito")
_WORDS = [f" {target}" for target in TARGETS] * 9 + [
    "The following is well known. As I was told yesterday, the weather stayed dry in other news."
]

# The same sizes under the names that each family gives them.
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_GPT_LIKE: dict[str, Any] = {
    "n_embd": HIDDEN,
    "n_inner": D_FF,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": CONTEXT,
}
_MULTI_HEAD = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT_LIKE,
    "gptj": {**_GPT_LIKE, "rotary_dim": 4},
    "gpt_neox": _MULTI_HEAD,
    "opt": {
        **{k: v for k, v in _MULTI_HEAD.items() if k != "intermediate_size"},
        "ffn_dim": D_FF,
        "word_embed_proj_dim": HIDDEN,
    },
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "gemma": {**_LLAMA_LIKE, "head_dim": 8},
    "phi": _LLAMA_LIKE,
}

KINDS = tuple(_SETTINGS)


def tiny_model(
    kind: str, *, seed: int = 0, tied: bool | None = None, **others: Any
) -> PreTrainedModel:
    """A random model of architecture `kind` in eval mode, the same one for the same seed.

    tied: whether input and output embeddings are one; None leaves it to the architecture. others:
    settings of its configuration that differ from the usual ones.
    """
    ids = {f"{name.strip('<>')}_token_id": i for i, name in enumerate(_SPECIAL)}
    settings = {**_SETTINGS[kind], **ids, "vocab_size": VOCABULARY, **others}
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    config = AutoConfig.for_model(kind, initializer_range=0.2, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def tiny_tokenizer(
    *, bos: bool = False, padding_side: str = "right", pad: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens that puts `<bos>` first if `bos`."""
    tokenizer = Tokenizer.from_str(_trained())
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>" if pad else None,
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_lm(model: PreTrainedModel) -> LanguageModel:
    """`model` with a tiny tokenizer."""
    return LanguageModel(model, tiny_tokenizer())


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_WORDS, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return str(tokenizer.to_str())
