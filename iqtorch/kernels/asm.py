"""Single machine instructions that Triton does not offer, each with a plain Triton twin.

`ASM` (a constexpr) chooses: inline PTX on NVIDIA, or the twin (interpreter, AMD, unknown cards). The two are equal bit for
bit; `tests/test_triton_asm.py` compares numpy models of the PTX with the twins.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

LOW_BYTES = tl.constexpr(0x01010101)
TOP_BITS = tl.constexpr(-0x7F7F7F80)  # 0x80808080
NIBBLE_BYTES = tl.constexpr(0x0F0F0F0F)


@triton.jit
def shift_right(a, n):
    """Logical shift of int32."""
    return (a.to(tl.uint32, bitcast=True) >> n).to(tl.int32, bitcast=True)


@triton.jit
def byte(a, i: tl.constexpr, SIGNED: tl.constexpr):
    """Byte i of int32, extended to int32."""
    if SIGNED:
        v = (a << (24 - 8 * i)) >> 24
    else:
        v = (a >> (8 * i)) & 255
    return v


@triton.jit
def bytes_of(a, SIGNED: tl.constexpr):
    """Bytes of int32 `[...]` as int32 `[..., 4]`."""
    slots = 24 - 8 * tl.arange(0, 4)
    moved = tl.expand_dims(a, len(a.shape)) << tl.reshape(slots, last_dimension(a.shape))
    if SIGNED:
        v = moved >> 24
    else:
        v = (moved >> 24) & 255
    return v


@triton.constexpr_function
def last_dimension(shape):
    """Shape `[1, .., 1, 4]`, one dimension more than `shape`."""
    return [1] * len(shape) + [4]


@triton.constexpr_function
def dot_text(w_signed, x_signed, start):
    """PTX of a byte dot product, added to operand 3 or to nothing."""
    kind = {True: "s32", False: "u32"}
    return f"dp4a.{kind[bool(w_signed)]}.{kind[bool(x_signed)]} $0, $1, $2, {'0' if start else '$3'};"


@triton.jit
def dot4_first(w, x, W_SIGNED: tl.constexpr, X_SIGNED: tl.constexpr):
    """Sum over four bytes of w * x (int32)."""
    text: tl.constexpr = dot_text(W_SIGNED, X_SIGNED, True)
    return tl.inline_asm_elementwise(text, "=r,r,r", [w, x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def dot4(w, x, acc, W_SIGNED: tl.constexpr, X_SIGNED: tl.constexpr):
    """acc + sum over four bytes of w * x (int32): dp4a. The twin is `bytes_of` and a sum, in vector.py."""
    text: tl.constexpr = dot_text(W_SIGNED, X_SIGNED, False)
    return tl.inline_asm_elementwise(text, "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def pack4(a, b, c, d, ASM: tl.constexpr):
    """The low bytes of four int32 in one."""
    if ASM:
        text: tl.constexpr = "{.reg .b32 lo, hi; prmt.b32 lo, $1, $2, 0x0040; prmt.b32 hi, $3, $4, 0x0040; prmt.b32 $0, lo, hi, 0x5410;}"
        v = tl.inline_asm_elementwise(text, "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)
    else:
        v = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24
    return v


@triton.jit
def lane():
    """Number of the thread in its warp, as a scalar that differs by thread: only for addresses of tables."""
    return tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def select(a, b, MASK: tl.constexpr):
    """Bits of `a` where MASK is set, else of `b`."""
    return (a & MASK) | (b & (MASK ^ -1))


@triton.jit
def from_lane(code, table):
    """The `table` register of lane `code % 32`: a look-up in a table of 32 words, one word per lane.

    Only in code that all threads of a warp run together.
    """
    return tl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $2, $1, 31, -1;", "=r,r,r", [code, table], dtype=tl.int32, is_pure=True, pack=1)


@triton.constexpr_function
def fetch_text(bits, constant):
    """PTX that loads `bits` bits (8, 16, or words) from item `at` of an array of such items."""
    load = "ld.global.nc" if constant else "ld.global"
    n = max(bits // 32, 1)
    kind = {8: "u8", 16: "u16"}.get(bits, "b32")
    vector = {1: "", 2: ".v2"}.get(n, ".v4")
    loads = ""
    for i in range(0, n, 4):
        target = ", ".join(f"${j}" for j in range(i, min(i + 4, n)))
        loads += f"{load}{vector}.{kind} {'{' + target + '}' if n > 1 else target}, [a+{4 * i}]; "
    return "{.reg .b64 a; mad.wide.u32 a, $" + f"{n + 1}, {bits // 8}, ${n}; {loads}" + "}"


@triton.constexpr_function
def fetch_constraints(bits):
    return "=r," * max(bits // 32, 1) + "l,r"


@triton.jit
def fetch_words(start, at, BITS: tl.constexpr, CONSTANT: tl.constexpr):
    """Items `at [...]` (int32) of an array of BITS bits each, which starts at the pointer `start`: a tuple of words, int32 `[...]` each.

    CONSTANT: nothing writes them while the kernel runs. That is not so of what the kernel before wrote, if this one may start before
    its end (`follow`): such loads are ordinary ones and stay where they are.

    A load of Triton's own fixes how a tensor is spread over the threads, as suits coalescing, and what depends on it is exchanged
    through shared memory where that does not fit. These loads are elementwise: every thread reads what it will decode.
    """
    n: tl.constexpr = max(BITS // 32, 1)
    text: tl.constexpr = fetch_text(BITS, CONSTANT)
    constraints: tl.constexpr = fetch_constraints(BITS)
    return tl.inline_asm_elementwise(text, constraints, [start.to(tl.int64), at], dtype=(tl.int32,) * n, is_pure=CONSTANT, pack=1)


@triton.jit
def joined(words):
    """Tensors `[...]` of a tuple as `[..., 2, 2]`, the last dimension the lowest bit of their number."""
    if len(words) == 1:
        v = words[0]
    else:
        v = tl.join(joined(words[0::2]), joined(words[1::2]))
    return v


@triton.jit
def fetch(start, at, BITS: tl.constexpr, CONSTANT: tl.constexpr = True):
    """`fetch_words` in one tensor, int32 `[..., words]`."""
    return tl.reshape(joined(fetch_words(start, at, BITS, CONSTANT)), with_words(at.shape, BITS))


@triton.constexpr_function
def with_words(shape, bits):
    """`shape` and the number of words in `bits` bits."""
    return [int(getattr(n, "value", n)) for n in shape] + [max(bits // 32, 1)]


@triton.jit
def two_floats(words, BFLOAT: tl.constexpr):
    """The two bfloat16, or float16, in each int32, lower first, as float32."""
    if BFLOAT:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        text: tl.constexpr = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
        low, high = tl.inline_asm_elementwise(text, "=f,=f,r", [words], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)
    return low, high


@triton.constexpr_function
def floats_text(signed):
    """PTX of `floats`: a byte becomes the low bits of 2^23."""
    takes = " ".join(f"prmt.b32 ${i}, v, 0x4B000000, 0x744{i};" for i in range(4))
    return "{.reg .b32 v; " + ("xor.b32 v, $4, 0x80808080; " if signed else "mov.b32 v, $4; ") + takes + "}"


@triton.jit
def floats(q, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """Four bytes as float32, each less `float_offset(SIGNED, 0)`: exact, and without a conversion, which is slow."""
    if ASM:
        text: tl.constexpr = floats_text(SIGNED)
        f0, f1, f2, f3 = tl.inline_asm_elementwise(
            text, "=f,=f,=f,=f,r", [q], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        offset: tl.constexpr = float_offset(SIGNED, 0)
        f0 = (byte(q, 0, SIGNED) - offset).to(tl.float32)
        f1 = (byte(q, 1, SIGNED) - offset).to(tl.float32)
        f2 = (byte(q, 2, SIGNED) - offset).to(tl.float32)
        f3 = (byte(q, 3, SIGNED) - offset).to(tl.float32)
    return f0, f1, f2, f3


@triton.constexpr_function
def float_offset(signed, base):
    """What must be added to a number of `floats` to get `byte + base`."""
    return base - ((1 << 23) + 128 if signed else 1 << 23)


@triton.jit
def two_rounded(a, b, BFLOAT: tl.constexpr):
    """Two float32 rounded to bfloat16, or float16, in one int32, `a` lower."""
    text: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if BFLOAT else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return tl.inline_asm_elementwise(text, "=r,f,f", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def prefetch(start, size):
    """Asks for `size` bytes (int32) from the pointer `start` on to come to the L2 cache; both multiples of 16. sm_90 and later."""
    text: tl.constexpr = (
        "{.reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;}"
    )
    tl.inline_asm_elementwise(text, "=r,l,r", [start.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def follow():
    """In a kernel launched with `launch_pdl`: waits for the kernels before, and lets the next one start. sm_90 and later.

    Before it, only what no kernel writes may be asked for.
    """
    text: tl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(text, "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def permute(a, b, PATTERN: tl.constexpr):
    """Bytes of (a, b) chosen by the nibbles of PATTERN (PTX prmt)."""
    text: tl.constexpr = "prmt.b32 $0, $1, $2, " + PATTERN + ";"
    return tl.inline_asm_elementwise(text, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def choose(a, b, selector):
    """Bytes of (a, b) chosen by the nibbles of `selector` (PTX prmt)."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def byte_mask(bits, ASM: tl.constexpr):
    """0xFF in every byte whose lowest bit is set, 0x00 in the others."""
    if ASM:
        v = permute(bits << 7, bits << 7, "0xBA98")
    else:
        v = (bits & LOW_BYTES) * 255
    return v


@triton.jit
def negate_positive_bytes(v, mask):
    """Two's complement of the bytes of v (1 .. 127) that `mask` selects: 256 - v, and no borrow between them."""
    return (v & (mask ^ -1)) | (0x01010100 - v) & mask


@triton.jit
def negate_small_bytes(v):
    """Two's complement of every byte, for bytes -127 .. 127."""
    return (0x01010100 - (v ^ TOP_BITS)) ^ TOP_BITS


@triton.constexpr_function
def two_sums_text(start):
    """PTX of `two_byte_sums`."""
    return "{.reg .b32 t; dp4a.u32.u32 t, $1, 0x01010101, " + str(0x0101 * start) + "; dp4a.u32.u32 $0, $2, 0x40404040, t;}"


@triton.jit
def two_byte_sums(a, b, START: tl.constexpr, ASM: tl.constexpr):
    """START + the sum of the bytes of a, and in the next byte START + a quarter of that of b: two sums in place by two instructions."""
    if ASM:
        text: tl.constexpr = two_sums_text(START)
        v = tl.inline_asm_elementwise(text, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        v = shift_right(a * LOW_BYTES, 24) + (shift_right(shift_right(b, 2) * LOW_BYTES, 24) << 8) + 0x0101 * START
    return v


@triton.constexpr_function
def cubic_text(s):
    """PTX of `cubic`: codes in the mantissa of 1024.0, Horner's rule, the result in the low byte of 1024 + 256 + value."""
    words = [f"0x{word:04x}{word:04x}" for word in s.cubic]
    constants = "".join(f"mov.b32 c{i}, {word};" for i, word in enumerate(words) if i != 3)
    steps = "".join(
        f"prmt.b32 x, $1, $2, {half}; add.rn.f16x2 x, x, c0; fma.rn.f16x2 {y}, x, c4, $3;"
        f"fma.rn.f16x2 {y}, {y}, x, c2; fma.rn.f16x2 {y}, {y}, x, c1;"
        for y, half in (("a", "0x4140"), ("b", "0x4342"))
    )
    return "{.reg .b32 x, a, b, c0, c1, c2, c4; " + constants + steps + "prmt.b32 $0, a, b, 0x6420;}"


@triton.jit
def cubic(q, magic, square, S: tl.constexpr):
    """Four values of a cubic polynomial, as bytes, for the codes in the bytes of q. The twin is a table.

    See `layout.CUBIC`; the constants that cannot be part of an instruction, 0x64646464 and the square's, come in registers.
    """
    text: tl.constexpr = cubic_text(S)
    return tl.inline_asm_elementwise(text, "=r,r,r,r", [q, magic, square], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def halves(q, scale, bias, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """Four bytes as float16: (byte + bias) * scale, the sum exact, the product rounded once.

    `scale` and `bias` are float16 tensors of q's shape; returns four of them. The PTX puts a byte into the mantissa of
    1024.0, so `bias` must already include -1024 (and -128 for signed bytes): see `half_offset`.
    """
    if ASM:
        flip: tl.constexpr = "xor.b32 v, $4, 0x80808080;" if SIGNED else "mov.b32 v, $4;"
        text: tl.constexpr = (
            "{.reg .b32 v, a, b, s, c; "
            + flip
            + "mov.b32 s, {$5, $5}; mov.b32 c, {$6, $6};"
            + "prmt.b32 a, v, 0x64646464, 0x4140; prmt.b32 b, v, 0x64646464, 0x4342;"
            + "add.rn.f16x2 a, a, c; add.rn.f16x2 b, b, c; mul.rn.f16x2 a, a, s; mul.rn.f16x2 b, b, s;"
            + "mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b;}"
        )
        h0, h1, h2, h3 = tl.inline_asm_elementwise(
            text, "=h,=h,=h,=h,r,h,h", [q, scale, bias], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        offset: tl.constexpr = half_offset(SIGNED, 0)
        h0 = ((byte(q, 0, SIGNED) - offset).to(tl.float16) + bias) * scale
        h1 = ((byte(q, 1, SIGNED) - offset).to(tl.float16) + bias) * scale
        h2 = ((byte(q, 2, SIGNED) - offset).to(tl.float16) + bias) * scale
        h3 = ((byte(q, 3, SIGNED) - offset).to(tl.float16) + bias) * scale
    return h0, h1, h2, h3


@triton.jit
def scaled_pair(word, scale):
    """The two float16 in each int32, lower first, times `scale` (float16)."""
    text: tl.constexpr = "{.reg .b32 s, v; mov.b32 s, {$3, $3}; mul.rn.f16x2 v, $2, s; mov.b32 {$0, $1}, v;}"
    return tl.inline_asm_elementwise(text, "=h,=h,r,h", [word, scale], dtype=(tl.float16, tl.float16), is_pure=True, pack=1)


@triton.constexpr_function
def half_offset(signed, base):
    """What `halves` must add to the mantissa trick's number to get `byte + base`."""
    return base - (1024 + 128 if signed else 1024)
