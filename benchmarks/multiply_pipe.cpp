// What the multiplication pipes of an AVX-512 core allow: cycles for 8 `vpdpbusd` (16 rows x 32 weights x 1 row of activations) and
// the multiply-adds of scales and minima that go with them, operands in registers, nothing else.
//
//     g++ -O2 -mavx512f -mavx512vnni benchmarks/multiply_pipe.cpp -o /tmp/multiply_pipe && /tmp/multiply_pipe
#include <immintrin.h>
#include <algorithm>
#include <ctime>
#include <cstdio>

static double seconds() { return (double)std::clock() / CLOCKS_PER_SEC; }  // of this process: others do not count

// Seconds of a cycle, by a chain of multiplications that take three each.
static double cycle() {
  double best = 1;
  for (int i = 0; i < 5; ++i) {
    const double start = seconds();
    unsigned long x = 3;
    for (long n = 0; n < 20000000; ++n) asm volatile("imul %0, %0" : "+r"(x));
    best = std::min(best, (seconds() - start) / 20000000 / 3);
  }
  return best;
}

#define DOT(r) "vpdpbusd %0, %0, %%zmm" #r "\n"
#define FMA(r) "vfmadd231ps %0, %0, %%zmm" #r "\n"
// Twice, with registers of their own: a result is there after four cycles.
#define FIRST DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7)
#define SECOND DOT(8) DOT(9) DOT(10) DOT(11) DOT(12) DOT(13) DOT(14) DOT(15)
#define WRITTEN                                                                                                                  \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", \
      "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25"
#define MEASURE(text, first, second)                                                         \
  {                                                                                          \
    double best = 1;                                                                         \
    for (int i = 0; i < 9; ++i) {                                                            \
      const double start = seconds();                                                        \
      for (long n = 0; n < 1000000; ++n) asm volatile(FIRST first SECOND second ::"v"(zero) : WRITTEN); \
      best = std::min(best, (seconds() - start) / 2000000);                                  \
    }                                                                                        \
    std::printf("%-60s %.2f cycles\n", text, best / one);                                    \
  }

int main() {
  const double one = cycle();
  const __m512i zero = _mm512_setzero_si512();
  std::printf("%.2f GHz\n", 1e-9 / one);
  MEASURE("8 dot products", "", "")
  MEASURE("... and 1 multiply-add (scales in the operands)", FMA(16), FMA(21))
  MEASURE("... and 2 (a scale per 32)", FMA(16) FMA(17), FMA(21) FMA(22))
  MEASURE("... and 3 (a scale per 16, or scale and minimum per 32)", FMA(16) FMA(17) FMA(18), FMA(21) FMA(22) FMA(23))
  MEASURE("... and 5 (scale and minimum per 16)", FMA(16) FMA(17) FMA(18) FMA(19) FMA(20), FMA(21) FMA(22) FMA(23) FMA(24) FMA(25))
}
