"""Key statistics of a model of any dtype or place, of little text and memory; and what can fail."""

from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from transformers import AutoModelForCausalLM

from coachhook.errors import ModelError, StatisticsError
from coachhook.statistics import measure as statistics
from coachhook.statistics.source import StatisticsSource
from coachhook.statistics.sums import KeyReader
from coachhook.statistics.text import TokenBatch
from tests.support.measuring import LAYERS, SEQUENCES, measure, write_text
from tests.support.tiny import D_FF, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("small_shards")


class TestFaults:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_models_of_other_dtypes(self, dtype: torch.dtype) -> None:
        # Text of a file, because sampled text would differ where logits are rounded.
        ours = measure(self.text, tiny_model("llama", seed=7).to(dtype))
        reference = measure(self.text)
        for layer in LAYERS:
            assert ours[layer].moment.dtype == torch.float32
            scale = reference[layer].moment.abs().max()
            difference = (ours[layer].moment - reference[layer].moment).abs().max()
            assert difference <= (1e-5 if dtype == torch.float64 else 3e-2) * scale

    @pytest.fixture(autouse=True)
    def _text(self, tmp_path: Path) -> None:
        self.text = write_text(tmp_path)

    def test_a_batch_larger_than_memory_is_read_in_halves(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = measure(self.text)
        read = KeyReader.read

        def small(self: KeyReader, batch: TokenBatch) -> dict[int, torch.Tensor]:
            if 2 < len(batch.ids) <= SEQUENCES:
                raise torch.OutOfMemoryError("no room")
            return read(self, batch)

        monkeypatch.setattr(KeyReader, "read", small)
        monkeypatch.setattr(statistics, "_cached", lambda *_: None)
        halved = measure(self.text)
        for layer in LAYERS:
            torch.testing.assert_close(halved[layer].moment, whole[layer].moment)
            torch.testing.assert_close(halved[layer].background, whole[layer].background)

    def test_a_key_that_is_not_finite_is_named(self, tmp_path: Path) -> None:
        model, ids = tiny_model("llama", seed=7), [torch.empty(0)]
        seven = tiny_tokenizer()("7")["input_ids"][0]
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: ids.__setitem__(0, args[0])
        )
        model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
            lambda _, args: args[0].masked_fill((ids[0] == seven).unsqueeze(-1), torch.inf)
        )
        with pytest.raises(
            StatisticsError, match=r"layer 1 .* the token '7', number \d+ .* in 'As in 1987, the"
        ):
            measure(self.odd_text(tmp_path), model)

    def test_a_model_that_is_not_finite_below_is_told_by_its_text(self, tmp_path: Path) -> None:
        model = tiny_model("llama", seed=7)
        with torch.no_grad():
            model.get_input_embeddings().weight[tiny_tokenizer()("7")["input_ids"][0]] = torch.nan
        with pytest.raises(StatisticsError, match=r"layer 1 .* every token of .* 'As in 19"):
            measure(self.odd_text(tmp_path), model)

    def odd_text(self, tmp_path: Path) -> StatisticsSource:
        text = "The weather was dry.\n\n" * 60 + "As in 1987, the weather."
        (tmp_path / "odd.txt").write_text(text)
        return StatisticsSource(str(tmp_path / "odd.txt"), n_tokens=100_000)

    def test_less_text_than_dimensions_is_measured_with_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny_model("llama").config
        config.intermediate_size = 300
        model = AutoModelForCausalLM.from_config(config).eval()
        found = measure(StatisticsSource(n_tokens=256), model)
        assert found[1].moment.shape == (300, 300)
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "256 tokens" in warning
        assert "300 dimensions" in warning

    def test_by_default_as_much_text_as_the_keys_are_wide(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("coachhook.statistics.source._FEWEST_BY_DEFAULT", 256)
        assert measure(StatisticsSource())[1].n_tokens == 8 * D_FF

    def test_an_offloaded_model_is_the_same_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = accelerate.cpu_offload(tiny_model("llama", seed=7), torch.device("cpu"))
        assert model.device.type == "meta"
        offloaded = measure(self.text, model)
        with monkeypatch.context() as patch:
            patch.setattr(statistics, "_measure", lambda *_: pytest.fail("not found in the cache"))
            measure(self.text)
        monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "another"))
        assert torch.equal(offloaded[1].moment, measure(self.text)[1].moment)

    def test_weights_without_values(self) -> None:
        with pytest.raises(ModelError, match="meta device"):
            measure(self.text, tiny_model("llama").to("meta"))

    def test_divided_weights(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = tiny_model("llama")
            mesh = init_device_mesh("cpu", (1,))
            distribute_module(model.get_submodule("model.layers.1.mlp"), mesh)
            with pytest.raises(StatisticsError, match="divided among processes"):
                measure(self.text, model)
        finally:
            dist.destroy_process_group()
