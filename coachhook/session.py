"""One run of edits into a folder: which facts remain, with which settings, batch after batch.

    with opened(folder, requests, batch_size=10) as session:
        for report in session.edit(session.editor(load_model("smollm2"))):
            ...

Each batch is saved before the next one starts, so that the same call goes on where a run was cut
short. Nothing is printed here: the command line, the demo and the benchmark show what they are
given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook.calibration import profiles
from coachhook.config import EditConfig, MemoryConfig, readout_of
from coachhook.editor import SITES, BatchReport, Editor, architecture_of, placed
from coachhook.errors import ConfigError
from coachhook.facts.remaining import remaining
from coachhook.facts.request import EditRequest, check_batch
from coachhook.hookset import HookSet
from coachhook.memory_plan import memory_plan
from coachhook.models.architecture import check_layers, default_layers
from coachhook.models.language_model import LanguageModel
from coachhook.plan import Plan, Sizes, edit_plan
from coachhook.statistics.source import StatisticsSource
from coachhook.storage import folder
from coachhook.system.processes import ALONE, Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Options:
    """Settings that the caller asks for; None where the folder, a profile or the default decides.

    text: path of the file whose text the statistics are measured on. profile: a file that
    `coachhook calibrate` wrote. Raises `ConfigError` for a value that `EditConfig` refuses.
    """

    gate: str | None = None
    layers: tuple[int, ...] | None = None
    template: str | None = None
    text: str | None = None
    profile: Path | None = None
    readout: str | None = None

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> EditConfig:
        """The settings of a new folder, before any profile. A gate or layers without a readout are
        those of `delta`; of layers under the memory readout the first is the gate's block, and the
        others are written to."""
        readout = readout_of(self.readout, self.gate, self.layers)
        memory, layers = MemoryConfig(), self.layers
        if readout == "memory" and layers is not None:
            memory = MemoryConfig(gate_block=layers[0], write_blocks=layers[1:] or None)
            layers = None
        return EditConfig(
            layers=layers,
            memory=memory,
            template=self.template,
            gate=self.gate or EditConfig.gate,
            readout=readout,
            statistics=StatisticsSource(self.text),
        )


@dataclass(frozen=True)
class Settings:
    """The settings of a run, and the profile and its file if they come from one.

    is_of_model: whether the profile was made for the model that is edited.
    """

    config: EditConfig
    profile: profiles.Profile | None = None
    path: Path | None = None
    is_of_model: bool = True


@dataclass(frozen=True)
class Session:
    """A run of edits into `directory`.

    held: the hooks that the folder already holds, or None. batches: the requests that remain.
    """

    directory: Path
    options: Options
    held: HookSet | None
    batches: Sequence[Sequence[EditRequest]]
    processes: Processes

    @property
    def requests(self) -> list[EditRequest]:
        """The requests that remain, in order."""
        return [request for batch in self.batches for request in batch]

    def settings(self, model: PreTrainedModel) -> Settings:
        """The settings to edit `model` with: those of the folder; for a new folder, those of the
        given profile or else of the model's own; without any profile, the options alone.

        Raises `BaseModelMismatchError` if the folder was made for another model, `ProfileError` if
        the given profile cannot be read, and `ConfigError` if it is of another readout.
        """
        if self.held is not None:
            self.held.check_base(model)
            return Settings(self.held.config)
        options, given = self.options, self.options.profile
        if given is not None and options.readout is None:
            options = replace(options, readout=profiles.load(given).readout)
        config = options.config()
        identify = profiles.identity
        if config.readout == "memory":
            identify = profiles.identity_of_blocks
        identity = identify(model, architecture_of(model, config))
        if given is None:
            profile = profiles.find(identity, config.readout)
        else:
            profile = profiles.load_for(given, config.readout)
        if profile is None:
            return Settings(placed(config, model))
        path, is_of_model = given or profiles.default_path(identity), profile.identity == identity
        config = placed(profile.settings.applied(config), model)
        return Settings(config, profile, path, is_of_model)

    def plan(self, lm: LanguageModel, config: EditConfig) -> Plan:
        """What the remaining batches will need; `Plan.check` refuses what cannot fit."""
        architecture = architecture_of(lm.model, config)
        earlier = 0 if self.held is None else len(self.held.edits)
        sizes = Sizes.of(lm.model, architecture, SITES[config.readout])
        batch_size = len(self.batches[0])
        if config.readout == "memory":
            given = (placed(config, lm.model), lm.tokenizer, self.requests, batch_size, earlier)
            return memory_plan(sizes, *given)
        n_blocks = len(architecture.blocks(lm.model))
        layers = check_layers(config.layers or default_layers(n_blocks), n_blocks)
        return edit_plan(sizes, layers, config, lm.tokenizer, self.requests, batch_size, earlier)

    def editor(self, lm: LanguageModel, config: EditConfig | None = None) -> Editor:
        """An editor that goes on from what the folder holds, or starts with `config` (by default
        with the options alone)."""
        if self.held is not None:
            return Editor.resume(self.directory, *lm, processes=self.processes)
        config = config or self.options.config()
        return Editor.from_pretrained(*lm, config=config, processes=self.processes)

    def edit(self, editor: Editor) -> Iterator[BatchReport]:
        """Edit and save batch after batch; each report comes when its batch is on disk.

        Raises `RequestError` or its kinds at once, before the first batch, where any request does
        not fit the tokenizer or the context.
        """
        for batch in self.batches:
            editor.check(batch)
        return self._edited(editor)

    def _edited(self, editor: Editor) -> Iterator[BatchReport]:
        for batch in self.batches:
            report = editor.edit(batch)
            editor.save_pretrained(self.directory)
            yield report


@contextmanager
def opened(
    directory: Path,
    requests: Sequence[EditRequest],
    batch_size: int,
    options: Options | None = None,
    processes: Processes = ALONE,
) -> Iterator[Session]:
    """The run that edits `requests` into `directory`, `batch_size` at a time. No other process can
    edit the folder inside the block. With several `processes`, all of them must call it.

    Raises `FolderLockedError` if another process edits the folder, `ConfigError` if the folder was
    made with settings other than `options`, and `ContradictionError` if two requests of one batch
    contradict each other.
    """
    options = options or Options()
    with ExitStack() as holding:
        if processes.is_first:
            holding.enter_context(folder.locked(directory))
        # The other processes read the folder only after the first has locked it.
        processes.everyone(True)
        held = HookSet.from_pretrained(directory) if folder.exists(directory) else None
        if held is not None:
            _check_options(options, held, directory)
        done = [] if held is None else [record.request for record in held.edits]
        left = remaining(done, requests)
        # All batches are checked before any is edited, and before the model is loaded.
        batches = [
            check_batch(left[start : start + batch_size])
            for start in range(0, len(left), batch_size)
        ]
        yield Session(directory, options, held, batches, processes)


def _check_options(options: Options, held: HookSet, directory: Path) -> None:
    """Raise `ConfigError` if an option that was given is not what `directory` was made with."""
    pairs = {
        "readout": (options.readout, held.config.readout),
        "gate": (options.gate, held.config.gate),
        "layers": (options.layers, _blocks(held.config) or held.layers),
        "template": (options.template, held.base.template),
        "text": (options.text, held.config.statistics.path),
    }
    for name, (asked, has) in pairs.items():
        if asked is not None and asked != has:
            raise ConfigError(
                f"--{name} {_shown(asked)} was asked for, but {directory} was made with "
                f"{_shown(has)}; leave --{name} out, or use another folder"
            )
    if options.profile is not None:
        settings = profiles.load_for(options.profile, held.config.readout).settings
        if settings.applied(held.config) != held.config:
            raise ConfigError(
                f"{directory} was made with other settings than those of {options.profile}; "
                "leave --profile out, or use another folder"
            )


def _blocks(config: EditConfig) -> tuple[int, ...]:
    """The blocks of the memory readout, as `Options.layers` has them."""
    memory = config.memory
    if config.readout != "memory" or memory.gate_block is None:
        return ()
    return memory.gate_block, *(memory.write_blocks or ())


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
