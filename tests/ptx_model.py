"""A numpy model of the few PTX instructions in iqtorch/kernels/asm.py, for Triton's interpreter.

With it the interpreter runs the kernels as NVIDIA cards do (`ASM` > 0), instruction by instruction, instead of their plain
twins. One thing a model of single elements cannot show is the exchange between threads: `shfl` is replaced by a look-up.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton._C.libtriton import interpreter as memory

from iqtorch.kernels import decode

Word = NDArray[Any]


def _bytes(word: Word, signed: bool) -> Word:
    return np.stack([(word >> np.uint32(8 * i)).astype(np.int8 if signed else np.uint8) for i in range(4)], -1).astype(np.int64)


def prmt(a: Word, b: Word, selector: Word) -> Word:
    """Byte i of the result: byte `selector nibble i & 7` of (a, b), or its sign bit eight times if the nibble has bit 3."""
    both = np.concatenate([_bytes(a, False), _bytes(b, False)], -1)
    out = np.zeros(a.shape, np.uint32)
    for i in range(4):
        nibble = ((selector >> np.uint32(4 * i)) & np.uint32(15)).astype(np.int64)
        byte = np.take_along_axis(both, (nibble & 7)[..., None], -1)[..., 0]
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def dp4a(kind: str, a: Word, b: Word, c: Word) -> Word:
    _, a_type, b_type = kind.split(".")
    total = (_bytes(a, a_type == "s32") * _bytes(b, b_type == "s32")).sum(-1) + c.astype(np.int32)
    return total.astype(np.int32).view(np.uint32)


def half2(operation: str, a: Word, b: Word, *c: Word) -> Word:
    """Each 16-bit half rounded on its own, as f16x2 instructions do."""
    out = np.zeros(a.shape, np.uint32)
    for shift in (0, 16):
        x, y = ((v >> np.uint32(shift)).astype(np.uint16).view(np.float16) for v in (a, b))
        # exact in float64, so rounded once
        x, y = x.astype(np.float64), y.astype(np.float64)
        z = (c[0] >> np.uint32(shift)).astype(np.uint16).view(np.float16) if c else 0.0
        r = np.asarray({"add": x + y, "mul": x * y, "fma": x * y + z}[operation], np.float16)
        out |= r.view(np.uint16).astype(np.uint32) << np.uint32(shift)
    return out


def load(address: Word, kind: str, count: int) -> list[Word]:
    """`count` neighbouring items of a kind (u8, u16, b32) from each address, aligned as the hardware demands."""
    item = np.dtype({"u8": np.uint8, "u16": np.uint16, "b32": np.uint32}[kind])
    where = np.ascontiguousarray(address).astype(np.uint64)
    assert (where % np.uint64(item.itemsize * count) == 0).all(), f"misaligned load of {count} {kind}"
    all_of = np.ones(where.shape, bool)
    out = [memory.load(where + np.uint64(item.itemsize * i), all_of, np.zeros(where.shape, item), item) for i in range(count)]
    return [v.astype(np.uint32) for v in out]


class Machine:
    """Registers of one inline assembly text; operands `$0 ..` first the results, then the arguments."""

    def __init__(self, arguments: list[Word], results: int) -> None:
        self.shape = arguments[0].shape if arguments else ()
        self.registers: dict[str, Word] = {f"${results + i}": a for i, a in enumerate(arguments)}

    def read(self, name: str) -> Word:
        if name.startswith("{"):
            low, high = (self.read(part).astype(np.uint32) for part in name.strip("{}").split(","))
            return low & np.uint32(0xFFFF) | high << np.uint32(16)
        if name in self.registers:
            return self.registers[name]
        return np.full(self.shape, int(name, 0) & 0xFFFFFFFF, np.uint32)

    def write(self, name: str, value: Word) -> None:
        if name.startswith("{"):
            low, high = name.strip("{}").split(",")
            self.registers[low], self.registers[high] = value & np.uint32(0xFFFF), value >> np.uint32(16)
        else:
            self.registers[name] = value

    def run(self, text: str) -> None:
        for line in text.strip().strip("{}" if text.strip().startswith("{.reg") else "").split(";"):
            line = line.strip()
            if not line or line.startswith(".reg"):
                continue
            opcode, rest = line.split(None, 1)
            operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
            target, *sources = (o.replace(" ", "") for o in operands)
            if opcode == "mov.u32" and sources == ["%laneid"]:
                self.write(target, np.zeros(self.shape, np.uint32))
                continue
            if opcode.startswith("ld.global"):
                base, offset = sources[0].strip("[]").split("+")
                parts = target.strip("{}").split(",")
                items = load(self.read(base) + np.uint64(int(offset)), opcode.rsplit(".", 1)[1], len(parts))
                for part, item in zip(parts, items, strict=True):
                    self.write(part, item)
                continue
            v = [self.read(s) for s in sources]
            if opcode.startswith("prmt"):
                result = prmt(*v)
            elif opcode.startswith("dp4a"):
                result = dp4a(opcode, *v)
            elif opcode.endswith("f16x2"):
                result = half2(opcode[:3], *v)
            elif opcode == "mad.wide.u32":
                result = v[0].astype(np.uint64) * v[1].astype(np.uint64) + v[2].astype(np.uint64)
            elif opcode == "cvt.f32.f16":
                result = v[0].astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
            elif opcode == "cvt.rn.f16x2.f32":
                high, low = (part.astype(np.uint32).view(np.float32).astype(np.float16).view(np.uint16).astype(np.uint32) for part in v)
                result = low | high << np.uint32(16)
            elif opcode == "xor.b32":
                result = v[0] ^ v[1]
            elif opcode == "abs.s32":
                result = np.abs(v[0].view(np.int32)).view(np.uint32)
            elif opcode == "mov.b32":
                result = v[0]
            else:
                raise NotImplementedError(f"no model of {opcode}")
            self.write(target, result)


class _Results:
    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def get_result(self, i: int) -> Any:
        return self.values[i]


def create_inline_asm(self: Any, text: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int) -> _Results:
    """Takes the place of `InterpreterBuilder.create_inline_asm`."""
    from triton.runtime.interpreter import TensorHandle

    def as_word(data: Word) -> Word:
        data = np.ascontiguousarray(data)
        if data.dtype.itemsize == 2:
            return data.view(np.uint16).astype(np.uint32)
        return data.view(np.uint64 if data.dtype.itemsize == 8 else np.uint32)

    machine = Machine([as_word(v.data) for v in values], len(types))
    machine.run(text)
    out = []
    for i, kind in enumerate(types):
        word = machine.read(f"${i}")
        if kind.scalar == tl.float16:
            value = word.astype(np.uint16).view(np.float16)
        else:
            value = word.view(np.float32 if kind.scalar == tl.float32 else np.int32)
        out.append(TensorHandle(value, kind.scalar))
    return _Results(out)


def _from_lane(code: Any, table: Any) -> Any:
    return tl.load(table + (code & 31))


def _prepare_scales(lut: Any, S: Any, ASM: Any) -> Any:
    return lut.to(tl.pointer_type(tl.int32), bitcast=True) if S.scale_map is None else lut


def _prepare(book: Any, S: Any, ASM: Any) -> Any:
    if S.family == "pairs":
        return (book, book + 32)
    return _real_prepare(book, S, ASM)


_real_prepare = decode.prepare


def install(monkeypatch: Any) -> None:
    """Makes the interpreter run PTX, and look-ups by lane read the table instead."""
    import triton
    from triton.runtime.interpreter import InterpreterBuilder

    from iqtorch.kernels import matrix, routed, scales, vector

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
    for module in (decode, scales, vector, matrix, routed):
        for name, function in (("from_lane", _from_lane), ("prepare_scales", _prepare_scales), ("prepare", _prepare)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, triton.jit(function))
