"""The Hugging Face examples run from beginning to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent


def run(*arguments: str, folder: Path) -> str:
    """Output of a script, run in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_quantize_and_chat(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "quantize_and_chat.py")
    first = run(script, "--prompt", "The old man looked at", "--tokens", "8", "--save", "packed", folder=tmp_path)
    again = run(script, "--model", "packed", "--prompt", "The old man looked at", "--tokens", "8", folder=tmp_path)
    assert "bits per weight" in first and first == again


def test_compile_and_export(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples" / "compile_and_export.py"), "--backend", "aot_eager", folder=tmp_path)
    assert "the same tokens" in out and "torch.export" in out


@pytest.mark.slow
def test_compile_and_export_with_a_compiler(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples" / "compile_and_export.py"), "--aot", "--dtype", "float32", folder=tmp_path)
    assert "the same tokens" in out and "AOTInductor" in out


def test_lora_finetune_notebook(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    notebook = json.loads((ROOT / "examples" / "lora_finetune.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    checks = "assert losses[-1] < losses[0] and adapted < plain - 0.1 and abs(same - adapted) < 1e-4 and after < plain - 0.1"
    (tmp_path / "notebook.py").write_text("\n\n".join([*cells, checks]))
    assert "merged and quantized again" in run("notebook.py", folder=tmp_path)
    assert (tmp_path / "merged-model" / "model.safetensors").exists()
