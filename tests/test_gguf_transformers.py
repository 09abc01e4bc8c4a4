"""Files that transformers reads too, by its own loader (and without keeping anything packed): both must mean the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from iqtorch.gguf import save_gguf

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.gguf")  # since 5.20 or so it knows these
from gguf_models import byte_level, logits, tiny  # noqa: E402 (imports transformers)

#: Not among them: families that it does not know, Falcon's newer form (whose rows it does not reorder) and gpt-oss in float32.
NAMES = (
    "llama", "qwen2", "qwen3", "qwen2-moe", "qwen3-moe", "gemma2", "gemma3", "phi3", "minimax-m2", "starcoder2", "gpt2", "falcon", "bloom",
    "stablelm", "stablelm-parallel", "nemotron", "mamba", "lfm2", "qwen3.5", "qwen3.5-equal", "qwen3.5-moe",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_same_model(tmp_path: Path, name: str) -> None:
    model = tiny(name, torch.float32, vocab_size=1024)
    save_gguf(model, tmp_path / "a.gguf", byte_level("llama-bpe"))
    model.config.architectures = [type(model).__name__]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", config=model.config, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
