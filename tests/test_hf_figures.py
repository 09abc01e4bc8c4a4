"""What importing, loading and quantizing cost, each in a process of its own: processor time and private memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iqtorch
from iqtorch import Recipe, get_format, ops

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
PREFIX = """
import os, sys, threading, time
import torch

class Peak:
    '''Largest private memory (not the pages of mapped files) above that at the start, in bytes.'''

    def now(self):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    def __enter__(self):
        self.start, self.bytes, self.done = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.001):
            self.bytes = max(self.bytes, self.now() - self.start)

    def __exit__(self, *error):
        self.bytes = max(self.bytes, self.now() - self.start)
        self.done.set()
        self.thread.join()
"""

#: Loads, quantizes and runs something small: the code that is loaded for this takes memory, too.
WARM_UP = """
import tempfile
with tempfile.TemporaryDirectory() as folder:
    small = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64)
    transformers.LlamaForCausalLM(small).to(torch.bfloat16).save_pretrained(folder)
    with torch.no_grad():
        quick = iqtorch.IQConfig(recipe=iqtorch.Recipe.pure("q4_0"))
        transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quick)(torch.arange(8)[None])
"""


def run(code: str, *arguments: object) -> list[float]:
    """The numbers that a script prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "ignore", "-c", PREFIX + code.replace("WARM_UP", WARM_UP), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [float(word) for word in done.stdout.split()]


def test_importing_takes_a_fifth_of_a_second_beyond_torch() -> None:
    code = "start = time.process_time(); import iqtorch; print(time.process_time() - start)"
    assert min(run(code)[0] for _ in range(3)) <= 0.2


TRELLIS = [name for name in iqtorch.list_formats() if name.endswith("_kt")]
#: Bytes of the largest weight, in bfloat16: a table, or the gates of all experts of a layer.
LARGEST = {"plain": 16384 * 1024 * 2, "mixture": 24 * 2048 * 512 * 2}


def save(path: Path, kind: str, **sizes: int) -> Path:
    torch.manual_seed(0)
    common = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64, "dtype": "bfloat16"}
    config = getattr(transformers, f"{kind}Config")(**common, **sizes)
    getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 177 MB in bfloat16: 4 layers, and a table and a head of 34 MB each."""
    return save(tmp_path_factory.mktemp("plain"), "Llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=16384)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 160 MB in bfloat16; the file has each expert for itself, the model the gates of 24 in one weight of 50 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_local_experts": 24, "vocab_size": 2048}
    return save(tmp_path_factory.mktemp("mixture"), "Mixtral", **sizes)


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    iqtorch.quantize_model(model, Recipe.pure("q8_0"), progress=False).save_pretrained(path)
    return path


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists() or ops.choose_backend(get_format("q8_0"), 1024, 1024, torch.device("cpu")) == "torch",
    reason="reads /proc, and is about the compiled kernels",
)


@needs_proc
@pytest.mark.parametrize(
    ("kind", "arguments", "head"),
    [
        ("plain", "", "q4_0"),
        ("plain", "device_map='cpu'", "q4_0"),
        ("plain", "dtype=torch.float32", "q4_0"),
        ("mixture", "", "q4_0"),
        ("plain", "", "iq1_kt"),
        pytest.param("plain", "", "iq4_kt", marks=pytest.mark.slow),
    ],
)
def test_quantizing_while_loading_needs_the_packed_model_and_two_of_its_largest_tensors(
    kind: str, arguments: str, head: str, request: pytest.FixtureRequest
) -> None:
    code = f"""
import iqtorch, transformers
transformers.utils.logging.disable_progress_bar()
config = iqtorch.IQConfig(recipe={{"lm_head": "{head}", ".": "q4_0"}})
WARM_UP
with Peak() as peak:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, {arguments})
print(peak.bytes, sum(p.nbytes for p in model.parameters()), sum(p.numel() * 2 for p in model.parameters()))
"""
    peak, model, original = run(code, request.getfixturevalue(kind))
    assert model < 0.3 * original  # packed
    assert model < peak <= model + 2 * LARGEST[kind] * (2 if "float32" in arguments else 1)  # tensors in the dtype that is loaded


@needs_proc
@pytest.mark.parametrize("name", [f if f == "iq1_kt" else pytest.param(f, marks=pytest.mark.slow) for f in TRELLIS])
def test_a_trellis_search_takes_no_more_than_its_workspace(name: str) -> None:
    code = f"""
from contextlib import nullcontext
from iqtorch import quantize
from iqtorch.encode.encoder import workspace
weight = torch.randn(4096, 1024, dtype=torch.bfloat16)
quantize(weight[:16], "{name}")
for room in (workspace(2**25), nullcontext()):
    with Peak() as peak, room:
        packed = quantize(weight, "{name}")
    print(peak.bytes - packed.nbytes)
"""
    limited, unlimited = run(code)
    assert limited <= 2**25 < unlimited


@needs_proc
def test_running_needs_the_packed_model_and_its_activations(packed: Path) -> None:
    code = """
import iqtorch, transformers
transformers.utils.logging.disable_progress_bar()
WARM_UP
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(64)[None]
with torch.no_grad(), Peak() as peak:
    for _ in range(2):
        model(ids)
print(peak.bytes, sum(p.nbytes for p in model.parameters()))
"""
    peak, model = run(code, packed)
    activations = 64 * 4 * (16384 + 4 * 4096 + 8 * 1024)  # logits and what a layer has at once, in float32
    assert 0.9 * model < peak <= 1.03 * model + activations + 2**22  # 4 MiB for the rest


@needs_proc
def test_loading_reads_no_weights_and_costs_less_than_reading_them(packed: Path) -> None:
    code = """
import iqtorch, transformers
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
transformers.utils.logging.disable_progress_bar()
LlamaForCausalLM.from_pretrained(sys.argv[1])
file, times = os.path.join(sys.argv[1], "model.safetensors"), []
for _ in range(5):
    start = time.process_time()
    whole = {name: tensor.clone() for name, tensor in load_file(file).items()}
    read = time.process_time() - start
    del whole
    with Peak() as peak:
        start = time.process_time()
        model = LlamaForCausalLM.from_pretrained(sys.argv[1])
        times.append((time.process_time() - start) / read)
deferred = all(p._deferred() is not None for p in model.parameters() if isinstance(p, iqtorch.IQTensor))
print(peak.bytes, os.path.getsize(file), min(times), int(deferred))
"""
    peak, size, ratio, deferred = run(code, packed)
    assert peak < 0.1 * size and deferred == 1
    assert ratio <= 1.3
