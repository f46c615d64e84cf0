"""One process of those that share a model, and what is measured of a model shared or whole.

`python -m torch.distributed.run --nproc-per-node 2 tests/tensor_parallel_worker.py FOLDER` reads
the cases that `prepare` put into FOLDER, and each process writes there what it saw.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import RowwiseParallel

from coachhook import EditConfig, Editor, EditRequest, HookLinear, HookSet
from coachhook.errors import AttachError, BaseModelMismatchError, ModelError
from coachhook.hooks.gates import Threshold
from coachhook.hooks.tensor_parallel import RowParallel
from coachhook.journal.factors import LayerFactors
from coachhook.journal.journal import Batch, EditRecord, Journal
from coachhook.models.architecture import Architecture
from coachhook.models.base import BaseModel, weight_checksums
from coachhook.models.passes import read_pass
from tests.support import tiny
from tests.support.tiny import tiny_model, tiny_tokenizer

LAYERS = (1, 2)
SKETCH = 16
PROMPTS = ["It rained, and the streets were wet again", "They moved to France", "Yes"]


@dataclass(frozen=True)
class Case:
    """A model and hooks on it. dense: so many edits that Δ is. whole_keys: the plan hands whole
    keys to every process, which cuts its slice out of them."""

    name: str
    kind: str
    gate: str
    dense: bool = False
    d_in: int = tiny.D_FF
    whole_keys: bool = False

    @property
    def n_edits(self) -> int:
        """In each of two batches."""
        return 12 if self.dense else 2

    @property
    def even(self) -> bool:
        """Whether two processes get equal shares; transformers 5.17 knows no gradient otherwise."""
        return self.d_in % 2 == 0

    def plan(self) -> Any:
        if not self.whole_keys:
            return "auto"
        mlp = "model.layers.*.mlp."
        gathered = dict.fromkeys((f"{mlp}gate_proj", f"{mlp}up_proj"), "colwise_gather_output")
        return {**gathered, f"{mlp}down_proj": "rowwise_split_input"}

    def whole(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / self.name / "model").eval()

    def shared(self, folder: Path) -> Any:
        plan = DistributedConfig(tp_plan=self.plan())
        path = folder / self.name / "model"
        return AutoModelForCausalLM.from_pretrained(path, distributed_config=plan).eval()

    def hooks(self, folder: Path) -> HookSet:
        return HookSet.from_pretrained(folder / self.name / "hooks")


CASES = [
    Case("keyed", "llama", "keyed"),
    Case("keyed-dense-bias", "gpt_neox", "keyed", dense=True),
    Case("sequence-bias", "phi", "sequence"),
    Case("sequence-dense-whole-keys", "llama", "sequence", dense=True, whole_keys=True),
    Case("calibrated-uneven", "llama", "calibrated", d_in=tiny.D_FF + 1),
]


def prepare(case: Case, folder: Path) -> None:
    """Save a random model, and hooks that one process made for it. They correct some of the tokens
    of `PROMPTS`, and no token of them is near the threshold."""
    model = tiny_model(case.kind, tied=False, intermediate_size=case.d_in)
    # Where biases start at zero, adding one twice would go unseen.
    random = torch.Generator().manual_seed(1)
    for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
        parameter.data = torch.randn(parameter.shape, generator=random)
    model.save_pretrained(folder / case.name / "model")
    architecture = Architecture.of(model)
    weights = [architecture.down_projection(model, layer).weight for layer in LAYERS]
    shapes = dict.fromkeys(LAYERS, (case.d_in, tiny.HIDDEN))
    base = BaseModel("tiny", weight_checksums(weights), architecture.template, shapes)
    sketches = {
        layer: (torch.randn(SKETCH, case.d_in, generator=random), torch.zeros(SKETCH))
        for layer in LAYERS
    }
    config = EditConfig(readout="delta", layers=LAYERS, gate=case.gate, fingerprint_size=SKETCH)
    requests = [EditRequest("{} is in", f"S{i}", "Lyon") for i in range(2 * case.n_edits)]
    journal = Journal()
    for half in range(2):
        first = half * case.n_edits
        edits = [EditRecord(i, requests[i]) for i in range(first, first + case.n_edits)]
        thresholds = dict.fromkeys(LAYERS, Threshold())
        nothing = {
            layer: LayerFactors.nothing(case.n_edits, shapes[layer], SKETCH) for layer in LAYERS
        }
        journal.batches.append(Batch(edits, nothing, thresholds))
    hooks = HookSet(base, config, sketches, journal)
    inputs, mask = inputs_of(PROMPTS)
    with hooks.attached(model):
        for layer in LAYERS:
            module = hooks.modules(model)[layer]
            keys = read_pass(model, inputs, [module])[0][0][mask]
            chosen = keys[torch.randperm(len(keys), generator=random)[: 2 * case.n_edits]]
            for number, own in enumerate(chosen.split(case.n_edits)):
                marks = own @ sketches[layer][0].T
                residuals = torch.randn(len(own), tiny.HIDDEN, generator=random)
                factors = LayerFactors(
                    residuals=residuals * 3,
                    solutions=own / own.square().sum(-1, keepdim=True),
                    keys=own,
                    fingerprints=marks / marks.norm(dim=-1, keepdim=True),
                    owner=torch.arange(len(own)),
                )
                # A new batch: hooks have used the old one, and batches never change.
                batch = journal.batches[number]
                journal.batches[number] = replace(batch, layers={**batch.layers, layer: factors})
            hooks.refresh([layer])
            # Half-way across the widest gap between neighbours, among those that let some through.
            z = module_z(hooks, model, layer, inputs, mask).sort().values
            few, many = len(z) // 4, len(z) - 2
            at = few + int((z[few + 1 : many + 1] - z[few:many]).argmax())
            alpha = float(z[at] + z[at + 1]) / 2
            journal.batches[-1].thresholds[layer] = Threshold(alpha=alpha)
            hooks.refresh([layer])
    hooks.save_pretrained(folder / case.name / "hooks")


def module_z(hooks: HookSet, model: Any, layer: int, inputs: Any, mask: Tensor) -> Tensor:
    """z-scores of the real tokens."""
    module = hooks.modules(model)[layer]
    [keys], _ = read_pass(model, inputs, [module])
    return module.read(keys).z[mask]


def inputs_of(prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    encoded = tiny_tokenizer(padding_side="left")(prompts, padding=True, return_tensors="pt")
    return dict(encoded), encoded["attention_mask"].bool()


def measure(case: Case, model: Any, hooks: HookSet) -> dict[str, Tensor]:
    """Logits of the real tokens of `PROMPTS` in every state of the hooks, and the rest of what a
    user sees. The hooks end without their last batch, and off the model."""
    inputs, mask = inputs_of(PROMPTS)
    seen: dict[str, Tensor] = {}

    def logits(name: str) -> None:
        with torch.no_grad():
            seen[name] = model(**inputs).logits[mask]

    before = dict(model.named_modules()), list(model.state_dict())
    logits("unhooked")
    hooks.attach(model)
    assert all((hook.up is None) == case.dense for hook in hooks.modules(model).values())
    assert list(model.state_dict()) == before[1]
    logits("hooked")
    with torch.no_grad():
        alone = [model(**inputs_of([prompt])[0]).logits[0] for prompt in PROMPTS]
    seen["each alone"] = torch.cat(alone)
    with torch.no_grad():
        seen["generated"] = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for layer, hook in hooks.modules(model).items():
        [keys], _ = read_pass(model, inputs, [hook])
        with torch.no_grad():
            closed = ~hook.read(keys).is_open
            seen[f"closed {layer}"] = hook(keys)[closed]
            seen[f"base where closed {layer}"] = hook.base(keys)[closed]
    traces = [hooks.trace(model, tiny_tokenizer(), prompt) for prompt in PROMPTS]
    seen["open"] = torch.cat([trace.is_open for trace in traces], dim=1)
    seen["edit"] = torch.cat([trace.edit for trace in traces], dim=1)
    seen["score"] = torch.cat([trace.score for trace in traces], dim=1)
    with hooks.off(model):
        logits("off")
    logits("on again")
    watched = hooks.modules(model)[LAYERS[0]].base.register_forward_hook(lambda *_: None)
    logits("watched")
    watched.remove()
    if case.even:
        seen["gradient"] = gradient(model, inputs)
    hooks.disable(0)
    logits("disabled")
    hooks.enable(0)
    logits("enabled")
    hooks.journal.batches.pop()
    hooks.journal.batches[-1].thresholds = dict.fromkeys(LAYERS, Threshold(alpha=-1e9))
    hooks.refresh()
    logits("rolled back")
    hooks.detach(model)
    logits("detached")
    assert dict(model.named_modules()) == before[0]
    assert list(model.state_dict()) == before[1]
    return {name: value.contiguous() for name, value in seen.items()}


def gradient(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of the last logits, in the embeddings."""
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
    logits[:, -1].square().sum().backward()
    assert embedded.grad is not None
    return embedded.grad


class Collectives(TorchDispatchMode):
    """Lists the operations between processes, of any interface, that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in op.namespace and "tensor" not in op._opname.replace("into_tensor", ""):
            self.found.append(op._opname)
        return op(*args, **(kwargs or {}))


def collectives(model: Any, hooks: HookSet) -> dict[str, list[str]]:
    """Of one pass without hooks, of one with them, and of a hooked layer alone."""
    inputs, _ = inputs_of(PROMPTS)
    with torch.no_grad():
        with Collectives() as unhooked:
            model(**inputs)
        with hooks.attached(model):
            with Collectives() as hooked:
                model(**inputs)
            hook = hooks.modules(model)[LAYERS[0]]
            [keys], _ = read_pass(model, inputs, [hook])
            with Collectives() as layer:
                hook(keys)
    return {"unhooked": unhooked.found, "hooked": hooked.found, "layer": layer.found}


def refusal(kind: type[Exception], run: Callable[[], Any]) -> str:
    """The message of the error that `run` must raise."""
    try:
        run()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def refusals(case: Case, model: Any, folder: Path) -> dict[str, str]:
    """What this process is told where something is wrong; the model stays without hooks."""
    differing = case.hooks(folder)
    if dist.get_rank() == 1:
        differing.disable(0)
    foreign = case.hooks(folder)
    foreign.base = replace(foreign.base, checksums=dict.fromkeys(foreign.base.checksums, "0" * 64))
    editing = partial(Editor.resume, folder / case.name / "hooks", model, tiny_tokenizer())
    found = {
        "differing": refusal(AttachError, lambda: differing.attach(model)),
        "foreign": refusal(BaseModelMismatchError, lambda: foreign.attach(model)),
        "editing": refusal(ModelError, editing),
    }
    for name, base in unfit_bases().items():
        found[name] = refusal(AttachError, partial(RowParallel.of, base))
    assert not any(isinstance(module, HookLinear) for module in model.modules())
    return found


def unfit_bases() -> dict[str, nn.Module]:
    """Layers that processes share in ways that hooks cannot follow."""
    n = dist.get_world_size()
    line, grid = init_device_mesh("cpu", (n,)), init_device_mesh("cpu", (1, n))

    def linear(mesh: DeviceMesh, *placements: Placement) -> nn.Linear:
        base = nn.Linear(8, 4)
        base.weight = nn.Parameter(distribute_tensor(base.weight.detach(), mesh, placements))
        return base

    replicated, by_input = Replicate(), Shard(1)
    plain, by_token = nn.Linear(8, 4), linear(line, by_input)
    RowwiseParallel().install_forward(plain, line)
    RowwiseParallel(output_layouts=by_input).install_forward(by_token, line)
    packed = linear(line, by_input)
    packed.in_features = 16
    two = linear(grid, replicated, by_input)
    return {"plain": plain, "packed": packed, "two dimensions": two, "output": by_token}


def main(folder: Path) -> None:
    report: dict[str, Any] = {}
    for case in CASES:
        model = case.shared(folder)
        name = f"rank{dist.get_rank()}.safetensors"
        save_file(measure(case, model, case.hooks(folder)), folder / case.name / name)
        report[case.name] = collectives(model, case.hooks(folder))
        if case is CASES[0]:
            report["refusals"] = refusals(case, model, folder)
            hooks = case.hooks(folder)
            with hooks.attached(model):
                if dist.get_rank() == 0:
                    hooks.save_pretrained(folder / case.name / "saved while shared")
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
