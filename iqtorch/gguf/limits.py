"""What a GGUF file may claim. Real files stay far below; damaged and hostile ones are refused before anything is allocated.

Every count and length is also checked against the bytes left in the file.
"""

from __future__ import annotations

VERSIONS = (2, 3)
MAX_METADATA = 1 << 16
MAX_TENSORS = 1 << 20
MAX_KEY_BYTES = 1 << 16
MAX_NAME_BYTES = 1 << 10
MAX_STRING_BYTES = 1 << 20
#: Values known to be long: a whole tokenizer.json.
MAX_STRING_BYTES_OF = {"tokenizer.huggingface.json": 1 << 27}
#: Strings of all arrays together: bounds the time that the header takes.
MAX_ARRAY_STRINGS = 1 << 24
MAX_ARRAY_DEPTH = 2
MAX_DIMENSIONS = 4
MAX_ELEMENTS = (1 << 63) - 1
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_PARTS = 1 << 12
