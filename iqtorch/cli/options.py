"""What the commands share: options, the models and recipes that they name, progress bars, and how results are printed."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from ..errors import IQTorchError
from ..files import check_place
from ..formats import list_formats
from ..progress import bars
from ..quantize import OBJECTIVES, ROUNDINGS, SPEEDS

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from ..evaluate import Progress as Report
    from ..recipe import Recipe

#: Name of the model inside the package.
EMBEDDED = "tiny-llama"

out = Console()
err = Console(stderr=True)


def _formats(incomplete: str) -> list[str]:
    return [name for name in list_formats() if name.startswith(incomplete)]


def _one_of(values: Sequence[str]) -> dict[str, Any]:
    """Settings of an option with these values."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in values:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(values)}")
        return value

    return {
        "callback": check,
        "autocompletion": lambda incomplete: [v for v in values if v.startswith(incomplete)],
        "metavar": "|".join(values),
    }


def _device(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{name!r} is no device of this machine: {str(error).partition(chr(10))[0]}") from error
    return name


def _readable(path: Path | None) -> Path | None:
    if path is not None:
        read_text(path)
    return path


def _size(text: str) -> str:
    if not re.fullmatch(r"\d+ *[KMGT]B", text, re.IGNORECASE):
        raise typer.BadParameter(f"{text!r} is no size, for instance 5GB or 500MB")
    return text


def _writable(path: Path) -> Path:
    check_place(path)
    return path


#: Settings of an argument or option that names a file to write; one that cannot be written is refused before anything is done.
WRITABLE: dict[str, Any] = {"callback": _writable}


def text_option(help: str) -> Any:
    """An option that takes a text; one that cannot be read is refused before a model is loaded."""
    return typer.Option(help=help, callback=_readable)


def read_text(path: Path) -> str:
    """Raises OSError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OSError(f"{path} is no UTF-8 text: {error}") from error


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder or hub name, GGUF file, or tiny-llama.")]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="GGUF file (.gguf) or folder to write.")]
Format = Annotated[
    str | None,
    typer.Option("--format", "-f", help="Format, as its default recipe; see `iqtorch formats`.", autocompletion=_formats),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", callback=_device)]
Limit = Annotated[int | None, typer.Option("--windows", help="Use only the first so many windows.", min=1)]


@dataclass(frozen=True)
class Quantization:
    """How to quantize a model."""

    format: Format = None
    recipe: Annotated[Path | None, typer.Option(help="Recipe file (TOML), instead of --format.")] = None
    pure: Annotated[bool, typer.Option("--pure", help="With --format: this one format for every matrix.")] = False
    rule: Annotated[list[str] | None, typer.Option(help="REGEX=FORMAT on parameter names, before the recipe. Repeatable.")] = None
    custom_q: Annotated[str | None, typer.Option(help="Rules on GGUF names, as ik_llama.cpp takes them: REGEX=TYPE,...")] = None
    skip: Annotated[list[str] | None, typer.Option(help="REGEX on parameter names: keep those weights. Repeatable.")] = None
    importance: Annotated[Path | None, typer.Option(help="Importance file (imatrix, .dat or .gguf).")] = None
    objective: Annotated[str, typer.Option(help="Best model, or least squared error.", **_one_of(OBJECTIVES))] = "model"
    speed: Annotated[str, typer.Option(help="How hard to search.", **_one_of(SPEEDS))] = "default"

    @property
    def wanted(self) -> bool:
        """Whether the command line asks for quantization."""
        return bool(self.format or self.recipe or self.rule or self.custom_q)

    def __post_init__(self) -> None:
        """Refuses what is wrong before a model is downloaded or loaded."""
        _ = self._recipe

    @functools.cached_property
    def _recipe(self) -> Recipe:
        """The recipe without the rules on GGUF names."""
        from ..recipe import Recipe

        if self.format and self.recipe:
            raise typer.BadParameter("give --format or --recipe, not both; --rule adds rules to either")
        base = Recipe.load(self.recipe) if self.recipe else Recipe()
        if self.format:
            base = Recipe.pure(self.format) if self.pure else Recipe.default(self.format)
        return base.with_rules(map(_rule, self.rule or ()))

    def recipe_for(self, names: Callable[[], Sequence[str]]) -> Recipe:
        """The recipe; `names`: of the model's parameters."""
        recipe = self._recipe
        if not self.custom_q:
            return recipe
        from ..gguf import custom_q

        own = len(self.rule or ())  # which come first
        rules = (*recipe.rules[:own], *custom_q(self.custom_q, names()), *recipe.rules[own:])
        return replace(recipe, rules=rules)

    def importance_of(self, model: str) -> Path | None:
        """The importance file; the embedded model brings its own."""
        from .. import data

        return self.importance or (data.TINY_LLAMA_IMPORTANCE if is_embedded(model) else None)

    def apply(self, model: nn.Module, name: str, **how: Any) -> nn.Module:
        """`quantize_model` on a loaded model."""
        from ..model import quantize_model

        recipe = self.recipe_for(lambda: [parameter for parameter, _ in model.named_parameters()])
        file = self.importance_of(name)
        how |= {"skip": self.skip or (), "objective": self.objective, "speed": self.speed}
        return quantize_model(model, recipe, file, **how)


@dataclass(frozen=True)
class Streaming:
    """How large files are written."""

    threads: Annotated[int | None, typer.Option(help="Threads. Default: one per core.", min=1)] = None
    max_shard_size: Annotated[str, typer.Option(help="Largest file of a folder.", callback=_size)] = "50GB"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT, or another run that it holds unfinished.")] = False
    requantize: Annotated[bool, typer.Option("--requantize", help="Quantize weights again that are quantized already.")] = False


@dataclass(frozen=True)
class Scoring:
    """Which text a model is scored on, and how."""

    text: Annotated[Path | None, text_option("UTF-8 text to score. Default: the held-out text inside the package.")] = None
    window: Annotated[int, typer.Option(help="Tokens per window; predictions in its second half are scored.", min=2)] = 512
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.", min=1)] = 4
    windows: Limit = None
    device: Device = "cpu"

    def load(self, model: str) -> tuple[nn.Module, Tensor]:
        """The model on its device, and the token ids of the text."""
        from .. import data, hf

        loaded, tokenizer = open_model(model)
        ids = hf.encode(tokenizer, read_text(self.text) if self.text else data.heldout_text())
        return loaded.to(self.device), ids[: self.windows * self.window] if self.windows else ids


#: What `--calibration` takes where the command line does not say.
ROUNDING, WINDOWS = "ldlq", 64


@dataclass(frozen=True)
class Calibrated:
    """Rounding with a text."""

    calibration: Annotated[Path | None, text_option("UTF-8 text for calibrated rounding: slower, better, and in memory.")] = None
    rounding: Annotated[
        str | None,
        typer.Option(
            help=f"With --calibration: kind of rounding. Default: {ROUNDING}.", **_one_of([name for name in ROUNDINGS if name != "nearest"])
        ),
    ] = None
    windows: Annotated[int | None, typer.Option(help=f"With --calibration: windows of 512 tokens to use. Default: {WINDOWS}.", min=1)] = (
        None
    )
    device: Annotated[
        str | None,
        typer.Option(
            help="With --calibration: where to run and round: cuda, cuda:1, ... (one block at a time; all for yaqa).", callback=_device
        ),
    ] = None

    def __post_init__(self) -> None:
        for option, value in (("--rounding", self.rounding), ("--windows", self.windows), ("--device", self.device)):
            if value is not None and self.calibration is None:
                raise typer.BadParameter("it is for --calibration TEXT, which is not given", param_hint=option)


#: Commands in the order of `iqtorch --help`, each with what stands below its help.
COMMANDS: list[tuple[Callable[..., None], str]] = []


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command; `examples` end its help."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        COMMANDS.append((function, "\n\n".join(["[bold]Examples[/bold]", *(f"  {example}" for example in examples)])))
        return function

    return add


def shared(**groups: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of dataclasses: `@shared(how=Quantization)` passes it `how`, filled from the command line."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        options = {
            name: [
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
                for field in fields(group)
            ]
            for name, group in groups.items()
            for hints in [get_type_hints(group, include_extras=True)]
        }

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = {name: group(**{p.name: values.pop(p.name) for p in options[name]}) for name, group in groups.items()}
            command(**values, **made)

        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += options.get(parameter.name, [parameter.replace(kind=parameter.KEYWORD_ONLY)])
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        del run.__wrapped__
        return run

    return decorate


def _rule(text: str) -> tuple[str, str | None]:
    pattern, separator, format = text.rpartition("=")
    if not (separator and pattern):
        raise typer.BadParameter(f"{text!r} is no REGEX=FORMAT, for instance 'down_proj=iq4_ks'", param_hint="--rule")
    return pattern, format


# -- models ----------------------------------------------------------------------------------------------------


def quiet() -> None:
    """No progress bars from transformers among ours."""
    from ..hf import transformers

    transformers().utils.logging.disable_progress_bar()


def is_embedded(model: str) -> bool:
    """Whether a name means the model inside the package."""
    return model == EMBEDDED and not Path(model).exists()


def located(model: str | Path) -> Path:
    """The path of a model or file; of a folder with a GGUF file and no checkpoint, that file.

    Raises:
        OSError: the folder has several.
    """
    path = Path(model)
    if not path.is_dir() or (path / "config.json").exists():
        return path
    from ..gguf.reader import models_in

    found = models_in(path)
    if len(found) > 1:
        raise OSError(f"{path} has {len(found)} GGUF files, name one of them: {', '.join(file.name for file in found)}")
    return found[0] if found else path


def open_model(model: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Model and tokenizer: the embedded one, a GGUF file, or what transformers finds under that name."""
    from .. import data, hf

    quiet()
    if is_embedded(model):
        return data.load_tiny_llama()
    if (path := located(model)).suffix == ".gguf":
        from .. import gguf

        return gguf.load_gguf(path), gguf.load_tokenizer(path)
    try:
        return hf.load_causal_lm(model, dtype)
    except IQTorchError:
        raise
    except (OSError, ValueError) as error:  # which transformers raises for models that it does not know
        what = "cannot be loaded" if path.exists() else "is no folder or file here, and the hub does not give it"
        raise OSError(f"{model!r} {what}: {error}") from error


def files_of(model: str) -> Path:
    """Folder or GGUF file of a model; a hub name is downloaded (or found in the cache)."""
    from .. import data, hf

    quiet()
    path = data.TINY_LLAMA if is_embedded(model) else located(model)
    if path.exists() or path.is_absolute() or model.count("/") != 1 or model.startswith(".") or path.suffix == ".gguf":
        return path
    hf.transformers()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]))


# -- output ----------------------------------------------------------------------------------------------------


def print_table(table: Table) -> None:
    """A table on standard output: as wide as a terminal, or in files and pipes as wide as it takes, for names are looked for there."""
    if not out.is_terminal:
        table.width = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    out.print(table, crop=False)


def print_json(value: object) -> None:
    """JSON on standard output."""
    print(json.dumps(value, indent=2))


@contextmanager
def bar(description: str) -> Iterator[Report]:
    """A progress bar on standard error, as a function of (done, total)."""
    with bars("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err) as shown:
        task = shown.add_task(description, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def counted(batches: Sequence[Tensor], advance: Report) -> Iterator[Tensor]:
    """The batches, counted as they are taken."""
    for i, batch in enumerate(batches, 1):
        yield batch
        advance(i, len(batches))
