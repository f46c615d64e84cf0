"""Where the ordinary text of key statistics comes from."""

from dataclasses import dataclass

from coachhook.errors import ConfigError
from coachhook.statistics import text as corpus

TOKENS_PER_WIDTH = 8
_FEWEST_BY_DEFAULT = 16_384


@dataclass(frozen=True)
class StatisticsSource:
    """Where ordinary text comes from: `path` (text, JSONL or Parquet), or the model's own samples.

    n_tokens: how many tokens to read; as many background keys are kept, up to 65,536. None means 8
    per dimension of the widest hooked layer's keys, but at least 16,384. seed: of the samples and
    the first words.
    """

    path: str | None = None
    n_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_tokens", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int | None) or not 0 <= (value or 0) < 2**63:
                raise ConfigError(f"{name} of statistics must be a whole number, not {value!r}")
        if self.n_tokens is not None and self.n_tokens < corpus.FEWEST_TOKENS:
            raise ConfigError(
                f"statistics need at least {corpus.FEWEST_TOKENS} tokens, not {self.n_tokens}"
            )

    def tokens_for(self, d_in: int) -> int:
        """How many tokens to read where the widest hooked layer has keys of `d_in` dimensions."""
        return self.n_tokens or max(_FEWEST_BY_DEFAULT, TOKENS_PER_WIDTH * d_in)
