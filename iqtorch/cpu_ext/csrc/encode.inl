// The encoder's search (see iqtorch/encode/search.py and affine.py for the method), compiled once per instruction set.
// AVX2 and AVX-512 give the same bytes; the portable version rounds multiply-adds twice and may settle near-ties otherwise.
#include "encode.h"
#include "encode_simd.h"

namespace iqtorch { namespace IQTORCH_ISA { namespace encoder {

constexpr float kInfinity = __builtin_inff();

// -- stored floats ---------------------------------------------------------------------------------------------

static float power_of_two(int e) {
  uint32_t bits = e < -126 ? (e < -149 ? 0u : 1u << (e + 149)) : (uint32_t)(e + 127) << 23;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

struct Stored {
  int kind;
  float up, down;  // of the unit: x is the weight times `down`

  int32_t bits(float v) const {
    v *= up;
    uint32_t u;
    if (kind == kHalf) {
      v = v > 65504.0f ? 65504.0f : v < -65504.0f ? -65504.0f : v;
      __builtin_memcpy(&u, &v, 4);
      const uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
      if (a >= 0x38800000) return (int32_t)(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13));
      float f;
      __builtin_memcpy(&f, &a, 4);
      volatile float shifted = f * 16777216.0f + 8388608.0f;  // the sum rounds to an integer
      return (int32_t)(sign | (uint32_t)(shifted - 8388608.0f));
    }
    __builtin_memcpy(&u, &v, 4);
    if (kind == kSingle) return (int32_t)u;
    if (!(v > 0)) return 0;
    const int e = (int)(u >> 23) - 127 + ((u & 0x7fffff) > 0x3504f3);  // mantissa above sqrt 2: up
    return e + 128 < 0 ? 0 : e + 128 > 254 ? 254 : e + 128;
  }

  float value(int32_t pattern) const {
    float f;
    if (kind == kHalf) {
      const uint32_t a = (uint32_t)pattern & 0x7fff;
      const uint32_t u = (a << 13) + 0x38000000;
      if (a < 0x400) f = (float)a * (1.0f / 16777216.0f);
      else __builtin_memcpy(&f, &u, 4);
      if (pattern & 0x8000) f = -f;
    } else if (kind == kSingle) {
      __builtin_memcpy(&f, &pattern, 4);
    } else {
      f = power_of_two(pattern - 128);
    }
    return f * down;
  }

  float round(float v) const { return value(bits(v)); }
};

IQ_FN float divide(double a, double b) { return b == 0 ? 0.0f : (float)(a / b); }

// -- nearest codes ---------------------------------------------------------------------------------------------

IQ_FN I cell_of(const Lookup& t, F twice) { return truncate(min(max(twice, set(t.low)), set(t.high)) - set(t.low)); }

IQ_FN int32_t rank_of(const ScaleGrid& g, float value) {
  float y = value * (2 / g.factor);
  y = y < g.rank.low ? g.rank.low : y > g.rank.high ? g.rank.high : y;
  return g.rank.index[(int32_t)(y - g.rank.low)];
}

// Scratch arrays, in floats from one block of memory.
struct Memory {
  float* next;
  float* take(size_t n) {
    float* p = next;
    next += (n + 15) / 16 * 16;
    return p;
  }
  int32_t* ints(size_t n) { return (int32_t*)take(n); }
};

struct Search {
  explicit Search(const Encoder& encoder) : f(encoder) {}

  const Encoder& f;
  int n, groups, count, codes;  // weights per group, groups, weights and codes of a unit
  int probes;  // cells to search: fewer for trials
  const float *x, *w;
  Stored stored;
  // trial results, for up to `count` weights or all trials of one group
  float *value, *scales;
  int32_t *code, *which;
  const float **item_x, **item_w;
  float *query_a, *query_b, *target;
  int32_t* query_code;
  uint8_t* negative;
  float* scores;
  // parabolas [keep][padded groups]
  int padded;
  float *optimum, *curvature, *gain;
  int32_t* kind;
  // what is best so far
  float *best_error, *best_value;
  int32_t *best_rank, *best_min, *best_kind, *best_code;
  float* moved;  // affine: x plus the offset of its group

  // Values (and codes) of `items` groups; item i is x[i], w[i] at scale s[i]. Trials do without codes, and so without parity.
  void find(int items, const float* const* xs, const float* const* ws, const float* s, int variant, bool codes_too);
  void table(const float* x, const float* w, float s, int variant, float* value, int32_t* code);
  void parity(const float* x, const float* w, float s, int variant, float* value, int32_t* code);
  void signs(const float* w, float low, uint8_t* minus);
  template <int V> void grid(int items, const float* const* xs, const float* const* ws, const float* s, int variant);
  template <int V> void full_search(int queries, int variant);
  template <int V> void cell_search(int queries, int variant);

  void propose(int g);
  float share();
  float assess(float d, int32_t* chosen);
  void attempt(const float* s, const int32_t* rank, const int32_t* kinds, const int32_t* minima = nullptr);
  float settle(float d);
  void run(const EncodeData& data, int64_t u);

  void run_affine(const EncodeData& data, int64_t u);
  void write(const EncodeData& data, int64_t u, float d);
};

void Search::table(const float* x, const float* w, float s, int variant, float* value, int32_t* code) {
  const F inverse = set(s < 1e-36f && s > -1e-36f ? 0.0f : 2 / s);
  const int32_t* index = f.table.index + variant * f.table.cells;
  const float* values = f.table.value + variant * f.table.cells;
  for (int j = 0; j < n; j += 16) {
    const I cell = cell_of(f.table, load(x + j) * inverse);
    store(value + j, gather(values, cell));
    if (code) store(code + j, f.i.code_parity ? cell : gather(index, cell));
  }
  if (code && f.i.code_parity) parity(x, w, s, variant, value, code);
}

// Words of codes with an odd count of ones: the code changes that costs least to change. `code` holds cells on entry.
void Search::parity(const float* x, const float* w, float s, int variant, float* value, int32_t* code) {
  const int32_t* index = f.table.index + variant * f.table.cells;
  const int32_t* others = f.other + variant * f.table.cells;
  const float* book = f.book + variant * f.i.entries;
  const int words = f.i.code_parity;
  for (int j = 0; j < n; j += words) {
    int odd = 0, cheapest = -1, cheapest_code = 0;
    float cost = kInfinity;
    for (int k = 0; k < words; ++k) {
      const int at = f.order[j + k], cell = code[at], other = others[cell];
      const float a = x[at] - s * book[other], b = x[at] - s * value[at];
      const float change = w[at] * (a * a - b * b);
      code[at] = index[cell];
      odd ^= f.odd[code[at]];
      if (change < cost) cost = change, cheapest = at, cheapest_code = other;
    }
    if (odd && cheapest >= 0) code[cheapest] = cheapest_code, value[cheapest] = book[cheapest_code];
  }
}

// Sixteen queries at a time against every entry: sum over the vector of (a + b c) c, with a = -2 w x and b = s w.
template <int V> void Search::full_search(int queries, int variant) {
  const float* book = f.book + (size_t)variant * f.i.entries * V;
  const int stride = (queries + 15) / 16 * 16;
  for (int q = 0; q < queries; q += 16) {
    F a[V], b[V], best = set(kInfinity);
    I found = seti(0);
    for (int i = 0; i < V; ++i) a[i] = load(query_a + i * stride + q), b[i] = load(query_b + i * stride + q);
    for (int e = 0; e < f.i.entries; ++e) {
      const float* c = book + e * V;
      F even = set(0), odd = set(0);
      for (int i = 0; i < V; i += 2) {
        const F g = set(c[i]), h = set(c[i + 1]);
        even = fma(fma(b[i], g, a[i]), g, even);
        odd = fma(fma(b[i + 1], h, a[i + 1]), h, odd);
      }
      keep_lower(even + odd, seti(e), best, found);
    }
    store(query_code + q, found);
  }
}

// One query at a time against the members of the cells whose centres score best.
template <int V> void Search::cell_search(int queries, int variant) {
  const Cells& cells = f.cells[variant];
  const int stride = (queries + 15) / 16 * 16, blocks = cells.cells / 16;
  alignas(64) float lows[kMaxCells / 16];
  for (int block = 0; block < kMaxCells / 16; ++block) lows[block] = kInfinity;
  for (int q = 0; q < queries; ++q) {
    F a[V], b[V];
    for (int i = 0; i < V; ++i) a[i] = set(query_a[i * stride + q]), b[i] = set(query_b[i * stride + q]);
    for (int block = 0; block < blocks; ++block) {
      F score = set(0);
      for (int i = 0; i < V; ++i) {
        score = fma(a[i], load(cells.centre + i * cells.cells + 16 * block), score);
        score = fma(b[i], load(cells.centre + (V + i) * cells.cells + 16 * block), score);
      }
      store(scores + 16 * block, score);
      lows[block] = lowest(score);
    }
    F best = set(kInfinity);
    I found = seti(0);
    for (int probe = 0; probe < probes && probe < cells.cells; ++probe) {
      // `lows` holds the lowest score of each vector of cells: at most 32 of them, in two vectors.
      const F low0 = load(lows), low1 = load(lows + 16);
      const float low = lowest(min(low0, low1));
      int block = first_equal(low0, low);
      if (block == 16) block += first_equal(low1, low);
      const int cell = 16 * block + first_equal(load(scores + 16 * block), low);
      scores[cell] = kInfinity;
      lows[block] = lowest(load(scores + 16 * block));
      for (int m = cells.first[cell]; m < cells.first[cell + 1]; ++m) {
        F even = set(0), odd = set(0);
        for (int i = 0; i < V; i += 2) {
          const F g = load(cells.value + (size_t)i * cells.padded + 16 * m), h = load(cells.value + (size_t)(i + 1) * cells.padded + 16 * m);
          even = fma(fma(b[i], g, a[i]), g, even);
          odd = fma(fma(b[i + 1], h, a[i + 1]), h, odd);
        }
        keep_lower(even + odd, load(cells.code + 16 * m), best, found);
      }
    }
    query_code[q] = index_of_lowest(best, found);
  }
}

template <int V> void Search::grid(int items, const float* const* xs, const float* const* ws, const float* s, int variant) {
  const int per = n / V, queries = items * per, stride = (queries + 15) / 16 * 16;
  for (int it = 0; it < items; ++it) {
    const float* w = ws[it];
    const float scale = s[it] < 0 ? -s[it] : s[it], sign = s[it] < 0 ? -1.0f : 1.0f;
    for (int j = 0; j < n; ++j) target[j] = xs[it][j] * sign;
    if (f.i.signs != kUnsigned) signs(w, f.smallest * scale, negative + it * n);
    for (int i = 0; i < V; ++i)
      for (int q = 0; q < per; ++q) {
        query_a[i * stride + it * per + q] = -2 * w[q * V + i] * target[q * V + i];
        query_b[i * stride + it * per + q] = scale * w[q * V + i];
      }
  }
  for (int i = 0; i < V; ++i)
    for (int q = queries; q < stride; ++q) query_a[i * stride + q] = query_b[i * stride + q] = 0;
  f.cells[0].cells ? cell_search<V>(queries, variant) : full_search<V>(queries, variant);
  const float* book = f.book + (size_t)variant * f.i.entries * V;
  for (int q = 0; q < queries; ++q) {
    const float* c = book + (size_t)query_code[q] * V;
    code[q] = query_code[q];
    for (int i = 0; i < V; ++i) value[q * V + i] = c[i];
  }
  if (f.i.signs != kUnsigned)
    for (int j = 0; j < items * n; ++j) value[j] = negative[j] ? -value[j] : value[j];
}

// Magnitudes in `target`, signs in `minus`; with even parity, of each eight the sign that costs least to turn is turned.
void Search::signs(const float* w, float low, uint8_t* minus) {
  for (int j = 0; j < n; ++j) minus[j] = target[j] < 0, target[j] = target[j] < 0 ? -target[j] : target[j];
  if (f.i.signs != kEven) return;
  for (int j = 0; j < n; j += 8) {
    int odd = 0, cheapest = j;
    float cost = kInfinity;
    for (int k = j; k < j + 8; ++k) {
      const float up = target[k] + low, down = low > target[k] ? low - target[k] : 0.0f;
      const float change = w[k] * (up * up - down * down);
      odd ^= minus[k];
      if (change < cost) cost = change, cheapest = k;
    }
    if (odd) minus[cheapest] ^= 1, target[cheapest] = -target[cheapest];
  }
}

void Search::find(int items, const float* const* xs, const float* const* ws, const float* s, int variant, bool codes_too) {
  if (f.i.vec == 2) return grid<2>(items, xs, ws, s, variant);
  if (f.i.vec == 4) return grid<4>(items, xs, ws, s, variant);
  if (f.i.vec == 8) return grid<8>(items, xs, ws, s, variant);
  for (int i = 0; i < items; ++i) table(xs[i], ws[i], s[i], variant, value + i * n, codes_too ? code + i * n : nullptr);
}

// -- one number per group: d * scale ---------------------------------------------------------------------------

IQ_FN float squared_error(const float* x, const float* w, float s, const float* c, int n) {
  F total = set(0);
  for (int j = 0; j < n; j += 16) {
    const F e = load(x + j) - set(s) * load(c + j);
    total = fma(load(w + j) * e, e, total);
  }
  return sum(total);
}

void Search::propose(int g) {
  const float *gx = x + g * n, *gw = w + g * n;
  float start = 0;
  if (f.i.vec == 1) {
    for (int j = 0; j < n; ++j) start = gx[j] > start ? gx[j] : -gx[j] > start ? -gx[j] : start;
  } else {
    F xx = set(0), ww = set(0);
    for (int j = 0; j < n; j += 16) {
      const F square = load(gx + j) * load(gx + j);
      xx = fma(load(gw + j) * square, square, xx), ww = ww + load(gw + j);
    }
    start = __builtin_sqrtf(__builtin_sqrtf(divide(sum(xx), sum(ww))));
  }
  start /= f.reference;
  const int trials = f.trial_count * (f.i.two_signs ? 2 : 1);
  const float* xs[kMaxTrials];
  const float* ws[kMaxTrials];
  for (int t = 0; t < trials; ++t) {
    xs[t] = gx, ws[t] = gw;
    scales[t] = start * (t < f.trial_count ? f.trials[t] : -f.trials[t - f.trial_count]);
  }
  int kept = 0;
  float best[kMaxKeep][3];
  int32_t kinds[kMaxKeep];
  for (int variant = 0; variant < f.i.variants; ++variant) {
    find(trials, xs, ws, scales, variant, false);
    float last_top = 0, last_won = -1;
    for (int t = 0; t < trials; ++t) {
      F xc = set(0), cc = set(0);
      for (int j = 0; j < n; j += 16) {
        const F c = load(value + t * n + j), wc = load(gw + j) * c;
        xc = fma(load(gx + j), wc, xc), cc = fma(wc, c, cc);
      }
      const float sxc = sum(xc), scc = sum(cc), top = scc == 0 ? 0.0f : sxc / scc, won = top * sxc;
      const bool repeated = top == last_top && won == last_won;  // the same codes as at the last trial scale
      last_top = top, last_won = won;
      if (repeated || (kept == f.i.keep && !(won > best[kept - 1][2]))) continue;
      int at = kept < f.i.keep ? kept++ : kept - 1;
      for (; at > 0 && won > best[at - 1][2]; --at) {
        for (int i = 0; i < 3; ++i) best[at][i] = best[at - 1][i];
        kinds[at] = kinds[at - 1];
      }
      best[at][0] = top, best[at][1] = scc, best[at][2] = won, kinds[at] = variant;
    }
  }
  for (int k = 0; k < f.i.keep; ++k) {
    const int from = k < kept ? k : 0;
    optimum[k * padded + g] = best[from][0], curvature[k * padded + g] = best[from][1];
    gain[k * padded + g] = best[from][2], kind[k * padded + g] = kinds[from];
  }
}

// Error of `d`, less that of zero, and the parabola each group chooses.
float Search::assess(float d, int32_t* chosen) {
  const F inverse = set(d == 0 ? 0.0f : 2 / (d * f.scale.factor)), step = set(d * f.scale.factor);
  F total = set(0);
  for (int g = 0; g < padded; g += 16) {
    F best = set(kInfinity);
    I found = seti(0);
    for (int k = 0; k < f.i.keep; ++k) {
      const F top = load(optimum + k * padded + g);
      const F e = fma(step, gather(f.scale.rank.value, cell_of(f.scale.rank, top * inverse)), set(0) - top);
      keep_lower(fma(e * e, load(curvature + k * padded + g), set(0) - load(gain + k * padded + g)), seti(k), best, found);
    }
    total = total + best;
    store(chosen + g, found);
  }
  return sum(total);
}

float Search::share() {
  float best = kInfinity, best_d = 0, reach = 0;
  int32_t* chosen = which;
  const auto consider = [&](float d) {
    d = stored.round(d);
    const float error = assess(d, chosen);
    if (!(error < best)) return 0.0f;
    best = error, best_d = d;
    double a = 0, b = 0;
    for (int g = 0; g < groups; ++g) {
      const int k = chosen[g] * padded + g;
      const double m = f.scale.value[rank_of(f.scale, d == 0 ? 0.0f : optimum[k] / d)], weight = curvature[k] * m;
      a += weight * optimum[k], b += weight * m;
    }
    return divide(a, b);
  };
  float fit = 0;
  const auto keep_fit = [&](float d) {
    const float r = consider(d);
    if (r != 0) fit = r;
  };
  for (int g = 0; g < groups; ++g)
    if (optimum[g] * optimum[g] > reach * reach) reach = optimum[g];
  if (f.scale.count == 1) {
    for (int k = 0; k < f.i.keep; ++k)
      for (int r = 0; r < f.reach_count; ++r) keep_fit(optimum[k * padded] / f.scale.largest * f.reach[r]);
  } else {
    for (int r = 0; r < f.reach_count; ++r) keep_fit(reach / (f.scale.largest * f.reach[r])), keep_fit(-reach / (f.scale.largest * f.reach[r]));
  }
  for (int i = 0; i < 3; ++i) keep_fit(fit);
  return best_d;
}

// Tries one scale and variant for every group (all those of `x` or, with minima, of `moved`).
void Search::attempt(const float* s, const int32_t* rank, const int32_t* kinds, const int32_t* minima) {
  const float* from = f.i.affine ? moved : x;
  const int per = n / f.i.vec;
  for (int variant = 0; variant < f.i.variants; ++variant) {
    int items = 0;
    for (int g = 0; g < groups; ++g)
      if (kinds[g] == variant) item_x[items] = from + g * n, item_w[items] = w + g * n, scales[items] = s[g], which[items++] = g;
    if (items) find(items, item_x, item_w, scales, variant, true);
    for (int it = 0; it < items; ++it) {
      const int g = which[it];
      const float error = squared_error(item_x[it], item_w[it], scales[it], value + it * n, n);
      if (!(error < best_error[g])) continue;
      best_error[g] = error, best_rank[g] = rank[g], best_kind[g] = variant;
      if (minima) best_min[g] = minima[g];
      __builtin_memcpy(best_value + g * n, value + it * n, 4 * n);
      __builtin_memcpy(best_code + g * per, code + it * per, 4 * per);
    }
  }
}

// From a first `d` to the final one, with codes.
float Search::settle(float d) {
  float* s = moved;  // free here
  int32_t *rank = best_min, *kinds = (int32_t*)(moved + padded);
  float* error = gain;  // predicted errors take the place of the gains
  for (int k = 0; k < f.i.keep; ++k)
    for (int g = 0; g < groups; ++g) {
      const int at = k * padded + g;
      const float e = d * f.scale.value[rank_of(f.scale, d == 0 ? 0.0f : optimum[at] / d)] - optimum[at];
      error[at] = e * e * curvature[at] - gain[at];
    }
  for (int g = 0; g < groups; ++g) best_error[g] = kInfinity;
  for (int i = 0; i < f.i.shortlist; ++i) {
    for (int g = 0; g < groups; ++g) {
      int k = 0;
      for (int j = 1; j < f.i.keep; ++j)
        if (error[j * padded + g] < error[k * padded + g]) k = j;
      if (error[k * padded + g] == kInfinity) { kinds[g] = -1; continue; }
      kinds[g] = kind[k * padded + g];
      rank[g] = rank_of(f.scale, d == 0 ? 0.0f : optimum[k * padded + g] / d);
      s[g] = d * f.scale.value[rank[g]];
      for (int j = 0; j < f.i.keep; ++j)
        if (kind[j * padded + g] == kinds[g] && rank_of(f.scale, d == 0 ? 0.0f : optimum[j * padded + g] / d) == rank[g])
          error[j * padded + g] = kInfinity;
    }
    attempt(s, rank, kinds);
  }
  const auto refit = [&] {
    double a = 0, b = 0, now = 0, then = 0;
    for (int g = 0; g < groups; ++g) {
      const float m = f.scale.value[best_rank[g]];
      F xc = set(0), cc = set(0);
      for (int j = 0; j < n; j += 16) {
        const F c = load(best_value + g * n + j), wc = load(w + g * n + j) * c;
        xc = fma(load(x + g * n + j), wc, xc), cc = fma(wc, c, cc);
      }
      a += (double)m * sum(xc), b += (double)m * m * sum(cc), now += best_error[g];
    }
    const float fit = stored.round(divide(a, b));
    for (int g = 0; g < groups; ++g) then += s[g] = squared_error(x + g * n, w + g * n, fit * f.scale.value[best_rank[g]], best_value + g * n, n);
    if (!(then < now)) return;
    d = fit;
    for (int g = 0; g < groups; ++g) best_error[g] = s[g];
  };
  refit();
  int32_t *rank_now = kinds + padded, *kind_now = rank_now + padded;
  for (int round = 0; round < f.i.rounds; ++round) {
    for (int g = 0; g < groups; ++g) rank_now[g] = best_rank[g], kind_now[g] = best_kind[g];
    for (int step = 0; step < 4; ++step) {  // as they are, scale down, scale up, other variant
      if (step == 3 ? f.i.variants == 1 : step && f.scale.count == 1) continue;
      for (int g = 0; g < groups; ++g) {
        const int r = rank_now[g] + (step == 1 ? -1 : step == 2 ? 1 : 0);
        rank[g] = r < 0 ? 0 : r >= f.scale.count ? f.scale.count - 1 : r;
        kinds[g] = step == 3 ? 1 - kind_now[g] : kind_now[g];
        s[g] = d * f.scale.value[rank[g]];
      }
      attempt(s, rank, kinds);
    }
    refit();
  }
  return d;
}

void Search::write(const EncodeData& data, int64_t u, float d) {
  data.d[u] = stored.bits(d);
  for (int g = 0; g < groups; ++g) {
    data.scale[u * groups + g] = f.scale.stored[best_rank[g]];
    data.variant[u * groups + g] = best_kind[g];
  }
  for (int c = 0; c < codes; ++c) data.code[u * codes + c] = best_code[c];
  if (f.i.signs != kUnsigned)
    for (int j = 0; j < count; ++j) data.negative[u * count + j] = __builtin_signbit(best_value[j]) != 0;
}

void Search::run(const EncodeData& data, int64_t u) {
  probes = f.i.trial_probes;
  for (int g = 0; g < groups; ++g) propose(g);
  probes = f.i.probes;
  write(data, u, settle(share()));
}

#include "encode_affine.inl"

// -- memory ----------------------------------------------------------------------------------------------------

static size_t prepare(Search& s, Memory m) {
  const EncodeInts& i = s.f.i;
  const float* begin = m.next;
  s.n = i.group, s.groups = i.groups, s.count = i.group * i.groups, s.codes = s.count / i.vec;
  s.padded = (s.groups + 15) / 16 * 16;
  const size_t trials = kMaxTrials * i.group, wide = s.count > (int)trials ? s.count : trials, items = s.padded > kMaxTrials ? s.padded : kMaxTrials;
  s.value = m.take(wide), s.code = m.ints(wide), s.query_a = m.take(wide + 16 * i.vec), s.query_b = m.take(wide + 16 * i.vec);
  s.query_code = m.ints(wide + 16), s.target = m.take(i.group), s.negative = (uint8_t*)m.take(wide / 4 + 16);
  s.scales = m.take(items), s.which = m.ints(items);
  s.item_x = (const float**)m.take(2 * items), s.item_w = (const float**)m.take(2 * items);
  s.scores = m.take(kMaxCells);
  const size_t arrays = (size_t)i.keep * s.padded;
  s.optimum = m.take(arrays), s.curvature = m.take(arrays), s.gain = m.take(arrays), s.kind = m.ints(arrays);
  s.best_error = m.take(s.padded), s.best_value = m.take(s.count), s.best_code = m.ints(s.count);
  s.best_rank = m.ints(s.padded), s.best_min = m.ints(s.padded), s.best_kind = m.ints(s.padded);
  s.moved = m.take(s.count + (size_t)(16 * kMaxKeep + 32) * s.padded);
  return 4 * (size_t)(m.next - begin);
}

static void encode_units(const Encoder& e, const EncodeData& data, void* scratch, int64_t u0, int64_t u1) {
  Search s(e);
  const size_t bytes = prepare(s, {(float*)scratch});
  __builtin_memset(scratch, 0, bytes);
  for (int64_t u = u0; u < u1; ++u) {
    s.x = data.x + u * s.count, s.w = data.w + u % data.weight_rows * s.count;
    s.stored = {e.i.d_kind, power_of_two(data.exponent[u]), power_of_two(-data.exponent[u])};
    e.i.affine ? s.run_affine(data, u) : s.run(data, u);
  }
}

}}}  // namespace iqtorch::IQTORCH_ISA::encoder

#define IQTORCH_ENCODER(isa)                                                                               \
  void encode_##isa(const Encoder& e, const EncodeData& data, void* scratch, int64_t u0, int64_t u1) {     \
    isa::encoder::encode_units(e, data, scratch, u0, u1);                                                  \
  }
