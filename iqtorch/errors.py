"""Named errors. Each message gives the value found, the limit and the remedy."""

from __future__ import annotations


class IQTorchError(Exception):
    """Base class of every error iqtorch raises on purpose."""


class UnknownFormatError(IQTorchError, ValueError):
    """A format name or GGUF type id that is not registered."""


class ShapeError(IQTorchError, ValueError):
    """A weight whose shape the format cannot hold."""


class BlockSizeError(IQTorchError, ValueError):
    """Canonical bytes of the wrong dtype, size or shape."""


class WeightError(IQTorchError, ValueError):
    """A weight that cannot be quantized: wrong dtype, NaN or Inf."""


class ImportanceError(IQTorchError, ValueError):
    """Importance values of the wrong length, negative or not finite."""


class UnsupportedOperationError(IQTorchError, NotImplementedError):
    """An operation that has no meaning on packed weights."""


class KernelUnavailableError(IQTorchError, RuntimeError):
    """A kernel or instruction set that was asked for by name and cannot run here."""


class RecipeError(IQTorchError, ValueError):
    """A recipe that cannot be read or applied."""


class EvaluationError(IQTorchError, ValueError):
    """A model or text that cannot be scored."""


class MissingDependencyError(IQTorchError, ImportError):
    """An optional package that this function needs is not installed."""


class CheckpointError(IQTorchError, ValueError):
    """A saved model that is damaged, incomplete, or of an unknown version."""


class CalibrationError(IQTorchError, ValueError):
    """Calibration that cannot be collected or read, or does not fit the model."""
