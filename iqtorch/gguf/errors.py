"""Named errors of GGUF files. All are `ValueError`s, and their messages start with the file."""

from __future__ import annotations

from ..errors import IQTorchError, UnknownFormatError


class GGUFError(IQTorchError, ValueError):
    """A GGUF file that cannot be read, or a model that cannot be written as one."""


class GGUFMagicError(GGUFError):
    """Not a GGUF file at all."""


class GGUFVersionError(GGUFError):
    """A version or byte order that is not supported."""


class GGUFTruncatedError(GGUFError):
    """The file ends before something that its header promises."""


class GGUFLimitError(GGUFError):
    """A count, length or depth beyond the limits of `iqtorch.gguf.limits`."""


class GGUFMetadataError(GGUFError):
    """A metadata entry that is malformed, there twice, or missing."""


class GGUFTensorError(GGUFError):
    """A tensor entry that is malformed: dimensions, offset, size, name."""


class GGUFTypeError(GGUFError, UnknownFormatError):
    """A tensor of a type id that is not known; `id_map` can name it."""


class GGUFSplitError(GGUFError):
    """Parts of a split file that are missing or do not belong together."""


class GGUFArchitectureError(GGUFError):
    """An architecture whose configuration or tensors iqtorch does not know."""


class GGUFNameError(GGUFError):
    """Tensors of the file that the model lacks, or parameters of the model that the file lacks."""


class GGUFTokenizerError(GGUFError):
    """A kind of tokenizer that cannot be converted."""
