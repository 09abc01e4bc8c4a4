// The encoder's search (see iqtorch/encode/search.py and affine.py for the method), compiled once per instruction set.
// All give the same bytes: the same operations in the same order, each rounded alike.
#include "encode_values.inl"

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

IQ_FN int32_t rank_of(const ScaleGrid& g, float value) {
  float y = value * (2 / g.factor);
  y = y < g.rank.low ? g.rank.low : y > g.rank.high ? g.rank.high : y;
  return g.rank.index[(int32_t)(y - g.rank.low)];
}

// Scratch arrays, in floats from one block of memory.
struct Memory {
  float* next;
  size_t grain = 16;
  float* take(size_t n) {
    float* p = next;
    next += (n + grain - 1) / grain * grain;
    return p;
  }
  int32_t* ints(size_t n) { return (int32_t*)take(n); }
};

#include "encode_boxes.inl"

#include "encode_lanes.inl"

// Units first, first + step, ... (`count` of them).
struct Span {
  int64_t first, count, step;
  int64_t unit(int64_t i) const { return first + i * step; }
};

// What is kept of the groups of a unit, or of one group, from step to step.
struct Kept {
  float *optimum, *curvature, *gain;  // parabolas [keep][padded]
  int32_t* kind;
  float* s;  // what to try next [tries][padded]
  int32_t *rank, *kinds;
  float *best_error, *best_value;  // what is best so far
  int32_t *best_rank, *best_kind, *best_code;

  // Returns the number of floats.
  size_t lay_out(const EncodeInts& i, Memory m, int groups, int padded) {
    const float* begin = m.next;
    const size_t arrays = (size_t)i.keep * padded;
    optimum = m.take(arrays), curvature = m.take(arrays), gain = m.take(arrays), kind = m.ints(arrays);
    const size_t tries = (size_t)(i.shortlist > 4 ? i.shortlist : 4) * padded;
    s = m.take(tries), rank = m.ints(tries), kinds = m.ints(tries);
    best_error = m.take(padded), best_value = m.take(groups * i.group), best_code = m.ints(groups * (i.group / i.vec));
    best_rank = m.ints(padded), best_kind = m.ints(padded);
    return m.next - begin;
  }
};

struct Search : Kept {
  Search(const Encoder& encoder, const EncodeData& all) : f(encoder), data(all) {}

  const Encoder& f;
  const EncodeData& data;
  int n, groups, count, codes;  // weights per group, groups, weights and codes of a unit
  int padded;                   // groups in whole vectors; 1 in steps over columns, which see one group of each unit
  int capacity;                         // items of `find`
  float depth;                          // see encode.h

  // Of the thread: groups to look up, and what is found.
  float *value, *scales;
  int32_t *code, *which;
  int64_t* item_unit;
  const float **item_x, **item_w;
  const int32_t** item_warm;  // codes thought to be near, or null
  float *query_a, *query_b, *target, *half_scores;
  int32_t* query_code;
  uint8_t* negative;
  Boxes<4> boxes4[2 * kMaxPositions];
  Boxes<8> boxes8[2 * kMaxPositions];

  // Of the unit (or, in steps over columns, its group) that was placed last.
  const float *x, *w;
  Stored stored;
  float d;
  float* records;  // of steps: what is kept of each group of each unit
  size_t record;
  int column;      // the group of all units that a step over columns works on, or -1

  void place(int64_t u);
  void exchange(int64_t u, bool save);

  // Values and codes of `items` groups.
  void find(int items, int variant);
  void signs(float* target, const float* w, float low, uint8_t* minus);
  template <int V> void grid(int items, int variant);
  template <int V> void full_search(int queries, int variant);
  template <int V> void halves_search(int queries, int variant);
  template <int V> void boxed(Boxes<V>* boxes, int items, int variant);

  float trial_unit(const float* gx) const;
  void propose(const Span& units, int g0, int g1);
  float share();
  float assess(float d, int32_t* chosen);
  void attempt(const Span& units, int g0, int g1, int t0, int t1);
  void attempt_all(const Span& units, int g0, int g1, int tries);
  void shortlist(const Span& units, int g0, int g1);
  void neighbours(const Span& units, int g0, int g1);
  void refit();
  void write(int64_t u);

  void run(int64_t u);
  void run_column(Step step, int64_t index);
  void run_unit(Step step, int64_t u);
};

#include "encode_grids.inl"

// -- one number per group: d * scale ---------------------------------------------------------------------------

IQ_FN float squared_error(const float* x, const float* w, float s, const float* c, int n) {
  F total = set(0);
  for (int j = 0; j < n; j += 16) {
    const F e = load(x + j) - set(s) * load(c + j);
    total = fma(load(w + j) * e, e, total);
  }
  return sum(total);
}

// Unit of the trial scales of a group.
float Search::trial_unit(const float* gx) const {
  F total = set(0);
  for (int j = 0; j < n; j += 16) {
    const F square = load(gx + j) * load(gx + j);
    total = fma(square, square, total);
  }
  return __builtin_sqrtf(__builtin_sqrtf(sum(total) / n)) / f.reference;
}

// The best parabolas of groups g0 to g1.
void Search::propose(const Span& units, int g0, int g1) {
  const int per = n / f.i.vec, keep = f.i.keep, trials = f.trial_count;
  const auto for_each_group = [&](auto work) {
    for (int64_t i = 0; i < units.count; ++i) {
      place(units.unit(i));
      for (int g = g0; g < g1; ++g) work(g, (int)i * (g1 - g0) + g - g0);
    }
  };
  for (int pass = 0; pass < f.i.variants * (f.i.two_signs ? 2 : 1); ++pass) {
    const int variant = f.i.two_signs ? pass / 2 : pass;
    const float sign = f.i.two_signs && pass % 2 ? -1.0f : 1.0f;
    int items = 0;
    for_each_group([&](int g, int) {
      const float *gx = x + g * n, *gw = w + g * n, unit = trial_unit(gx) * sign;
      for (int t = 0; t < trials; ++t, ++items) {
        item_x[items] = gx, item_w[items] = gw, scales[items] = unit * f.trials[t];
        item_warm[items] = t ? code + (items - 1) * per : nullptr;
      }
    });
    find(items, variant);
    for_each_group([&](int g, int group) {
      float *top = optimum + g, *bend = curvature + g, *won = gain + g;
      int32_t* of = kind + g;
      if (!pass)
        for (int k = 0; k < keep; ++k) won[k * padded] = -kInfinity;
      float last_top = 0, last_won = -1;
      for (int t = 0; t < trials; ++t) {
        const float* v = value + (size_t)(group * trials + t) * n;
        F xc = set(0), cc = set(0);
        for (int j = 0; j < n; j += 16) {
          const F c = load(v + j), wc = load(w + g * n + j) * c;
          xc = fma(load(x + g * n + j), wc, xc), cc = fma(wc, c, cc);
        }
        const float sxc = sum(xc), scc = sum(cc), optimal = scc == 0 ? 0.0f : sxc / scc, gained = optimal * sxc;
        const bool repeated = optimal == last_top && gained == last_won;  // the same codes as at the last trial scale
        last_top = optimal, last_won = gained;
        if (repeated || !(gained > won[(keep - 1) * padded])) continue;
        int at = (keep - 1) * padded;
        for (; at > 0 && gained > won[at - padded]; at -= padded)
          top[at] = top[at - padded], bend[at] = bend[at - padded], won[at] = won[at - padded], of[at] = of[at - padded];
        top[at] = optimal, bend[at] = scc, won[at] = gained, of[at] = variant;
      }
    });
  }
  for_each_group([&](int g, int) {
    for (int k = 1; k < keep; ++k) {
      const int at = k * padded + g;
      if (gain[at] == -kInfinity) optimum[at] = optimum[g], curvature[at] = curvature[g], gain[at] = gain[g], kind[at] = kind[g];
    }
  });
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

// Tries the scales `s` and variants `kinds` t0 to t1 of each group, except those of kind -1.
void Search::attempt(const Span& units, int g0, int g1, int t0, int t1) {
  const int per = n / f.i.vec;
  for (int variant = 0; variant < f.i.variants; ++variant) {
    int items = 0;
    for (int64_t i = 0; i < units.count; ++i) {
      const int64_t u = units.unit(i);
      place(u);
      for (int t = t0; t < t1; ++t)
        for (int g = g0; g < g1; ++g) {
          const int at = t * padded + g;
          if (kinds[at] != variant) continue;
          item_x[items] = x + g * n, item_w[items] = w + g * n, scales[items] = s[at], item_unit[items] = u, which[items] = at;
          const bool again = t > t0 && items && item_x[items - 1] == x + g * n;
          item_warm[items] = best_error[g] < kInfinity ? best_code + g * per : again ? code + (items - 1) * per : nullptr;
          ++items;
        }
    }
    if (items) find(items, variant);
    for (int it = 0; it < items; ++it) {
      place(item_unit[it]);
      const int g = which[it] % padded;
      const float error = squared_error(item_x[it], item_w[it], scales[it], value + it * n, n);
      if (!(error < best_error[g])) continue;
      best_error[g] = error, best_rank[g] = rank[which[it]], best_kind[g] = variant;
      __builtin_memcpy(best_value + g * n, value + it * n, 4 * n);
      __builtin_memcpy(best_code + g * per, code + it * per, 4 * per);
    }
  }
}

// All `tries`: together by column, which makes most of its boxes; otherwise one by one, whose values stay in the cache.
void Search::attempt_all(const Span& units, int g0, int g1, int tries) {
  if (column >= 0) return attempt(units, g0, g1, 0, tries);
  for (int t = 0; t < tries; ++t) attempt(units, g0, g1, t, t + 1);
}

// The first codes, at the `d` of `share`: those of the scales and variants with the lowest parabolas.
void Search::shortlist(const Span& units, int g0, int g1) {
  const int keep = f.i.keep;
  for (int64_t i = 0; i < units.count; ++i) {
    place(units.unit(i));
    float* error = gain;  // predicted errors take the place of the gains
    const auto rank_at = [&](int at) { return rank_of(f.scale, d == 0 ? 0.0f : optimum[at] / d); };
    for (int k = 0; k < keep; ++k)
      for (int g = g0; g < g1; ++g) {
        const int at = k * padded + g;
        const float e = d * f.scale.value[rank_at(at)] - optimum[at];
        error[at] = e * e * curvature[at] - gain[at];
      }
    for (int g = g0; g < g1; ++g) {
      best_error[g] = kInfinity;
      for (int t = 0; t < f.i.shortlist; ++t) {
        const int to = t * padded + g;
        int k = g;
        for (int j = 1; j < keep; ++j)
          if (error[j * padded + g] < error[k]) k = j * padded + g;
        kinds[to] = error[k] == kInfinity ? -1 : kind[k];
        if (kinds[to] < 0) continue;
        rank[to] = rank_at(k), s[to] = d * f.scale.value[rank[to]];
        for (int j = g; j < keep * padded; j += padded)
          if (kind[j] == kinds[to] && rank_at(j) == rank[to]) error[j] = kInfinity;
      }
    }
  }
  attempt_all(units, g0, g1, f.i.shortlist);
}

// The chosen scales again (`d` has changed), those beside them, and the other variant.
void Search::neighbours(const Span& units, int g0, int g1) {
  for (int64_t i = 0; i < units.count; ++i) {
    place(units.unit(i));
    for (int g = g0; g < g1; ++g)
      for (int t = 0; t < 4; ++t) {
        const int r = best_rank[g] + (t == 1 ? -1 : t == 2 ? 1 : 0), to = t * padded + g;
        rank[to] = r < 0 ? 0 : r >= f.scale.count ? f.scale.count - 1 : r;
        kinds[to] = t == 3 ? (f.i.variants == 1 ? -1 : 1 - best_kind[g]) : t && f.scale.count == 1 ? -1 : best_kind[g];
        s[to] = d * f.scale.value[rank[to]];
      }
  }
  attempt_all(units, g0, g1, 4);
}

// Least-squares `d` for the codes and scales of now, if it lowers the error once rounded.
void Search::refit() {
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
}

void Search::write(int64_t u) {
  data.d[u] = stored.bits(d);
  for (int g = 0; g < groups; ++g) {
    data.scale[u * groups + g] = f.scale.stored[best_rank[g]];
    data.variant[u * groups + g] = best_kind[g];
  }
  for (int c = 0; c < codes; ++c) data.code[u * codes + c] = best_code[c];
  F product = set(0);
  for (int j = 0; data.product && j < count; j += 16)
    product = fma(load(w + j) * load(x + j), set(d * f.scale.value[best_rank[j / n]]) * load(best_value + j), product);
  if (data.product) data.product[u] = sum(product);
  if (f.i.signs != kUnsigned)
    for (int j = 0; j < count; ++j) data.negative[u * count + j] = __builtin_signbit(best_value[j]) != 0;
}

void Search::run(int64_t u) {
  const Span one{u, 1, 1};
  place(u);
  const int some = capacity / f.trial_count;
  for (int g = 0; g < groups; g += some) propose(one, g, g + some < groups ? g + some : groups);
  d = share();
  shortlist(one, 0, groups);
  refit();
  for (int round = 0; round < f.i.rounds; ++round) neighbours(one, 0, groups), refit();
  write(u);
}

// One step for a column: the groups g of units c, c + weight_rows, ..., some at a time.
void Search::run_column(Step step, int64_t index) {
  const int64_t c = index / groups, stride = data.weight_rows;
  const int items = step == kPropose ? f.trial_count : step == kShortlist ? f.i.shortlist : 4;
  const int64_t most = capacity / items;
  column = (int)(index % groups), padded = 1, depth = step == kPropose ? f.trial_depth : f.depth;
  for (int64_t u = c; u < data.units; u += most * stride) {
    const int64_t left = (data.units - u + stride - 1) / stride;
    const Span units{u, left < most ? left : most, stride};
    step == kPropose ? propose(units, 0, 1) : step == kShortlist ? shortlist(units, 0, 1) : neighbours(units, 0, 1);
  }
}

// One step for a unit, between those for its columns.
void Search::run_unit(Step step, int64_t u) {
  column = -1;
  place(u);
  exchange(u, false);
  d = step == kShare ? share() : stored.value(data.d[u]);
  if (step == kRefit) refit(), exchange(u, true);
  if (step == kWrite) write(u);
  data.d[u] = stored.bits(d);
}

// -- memory ----------------------------------------------------------------------------------------------------

void Search::place(int64_t u) {
  x = data.x + u * count, w = data.w + u % data.weight_rows * count;
  stored = {f.i.d_kind, power_of_two(data.exponent[u]), power_of_two(-data.exponent[u])};
  if (column < 0) return;
  x += column * n, w += column * n, d = stored.value(data.d[u]);
  lay_out(f.i, {records + (column * data.units + u) * record, 1}, 1, 1);
}

// Between the arrays of a whole unit and the records of its groups.
void Search::exchange(int64_t u, bool save) {
  const int per = n / f.i.vec;
  for (int g = 0; g < groups; ++g) {
    Kept one;
    one.lay_out(f.i, {records + (g * data.units + u) * record, 1}, 1, 1);
    if (save) {
      *one.best_error = best_error[g];
      continue;
    }
    for (int k = 0; k < f.i.keep; ++k)
      optimum[k * padded + g] = one.optimum[k], curvature[k * padded + g] = one.curvature[k], gain[k * padded + g] = one.gain[k];
    best_error[g] = *one.best_error, best_rank[g] = *one.best_rank, best_kind[g] = *one.best_kind;
    __builtin_memcpy(best_value + g * n, one.best_value, 4 * n);
    __builtin_memcpy(best_code + g * per, one.best_code, 4 * per);
  }
}

// Lays out the scratch from `m` on; bytes that must be zero at first.
static size_t prepare(Search& s, Memory& m) {
  const EncodeInts& i = s.f.i;
  const float* begin = m.next;
  s.n = i.group, s.groups = i.groups, s.count = i.group * i.groups, s.codes = s.count / i.vec;
  s.padded = (s.groups + 15) / 16 * 16;
  const int least = i.box_bits ? 2048 : kMaxTrials;
  s.capacity = least > s.padded ? least : s.padded;
  const size_t wide = (size_t)s.capacity * i.group;
  s.value = m.take(wide + 16), s.code = m.ints(wide / i.vec + 16), s.negative = (uint8_t*)m.take(wide / 4 + 16);
  s.scales = m.take(s.capacity), s.which = m.ints(s.capacity), s.item_unit = (int64_t*)m.take(2 * s.capacity);
  s.item_x = (const float**)m.take(2 * s.capacity), s.item_w = (const float**)m.take(2 * s.capacity);
  s.item_warm = (const int32_t**)m.take(2 * s.capacity);
  if (!i.box_bits) {
    s.query_a = m.take(wide + 32 * i.vec), s.query_b = m.take(wide + 32 * i.vec), s.query_code = m.ints(wide / i.vec + 32);
    s.target = m.take(i.group), s.half_scores = m.take(2 * kMostHalves * 32);
  }
  m.next += s.lay_out(i, m, s.groups, s.padded);
  const size_t bytes = 4 * (size_t)(m.next - begin);
  for (int b = 0; i.box_bits && b < i.variants * i.group / i.vec; ++b) i.vec == 4 ? s.boxes4[b].prepare(s.f, m) : s.boxes8[b].prepare(s.f, m);
  return bytes;
}

static inline size_t scratch_bytes(const Encoder& e) {
  if (e.i.vec == 1) return lanes_bytes(e);
  Search s(e, {});
  Memory m{(float*)64};
  prepare(s, m);
  return (size_t)((char*)m.next - (char*)64);
}

// Of each unit.
static inline size_t record_bytes(const Encoder& e) {
  Search s(e, {});
  Memory m{(float*)64};
  prepare(s, m);
  return 4 * s.groups * s.lay_out(e.i, {(float*)64, 1}, 1, 1);
}

static void encode_step(const Encoder& e, const EncodeData& data, Step step, void* scratch, void* records, int64_t i0, int64_t i1) {
  if (e.i.vec == 1) return encode_lanes(e, data, scratch, i0, i1);
  Search s(e, data);
  Memory m{(float*)scratch};
  const size_t bytes = prepare(s, m);
  __builtin_memset(scratch, 0, bytes);
  s.column = -1, s.records = (float*)records, s.record = record_bytes(e) / (4 * s.groups);
  for (int64_t i = i0; i < i1; ++i)
    step == kWhole ? s.run(i) : by_column(step) ? s.run_column(step, i) : s.run_unit(step, i);
}

}}}  // namespace iqtorch::IQTORCH_ISA::encoder

#define IQTORCH_ENCODER(isa)                                                                                                       \
  void encode_##isa(const Encoder& e, const EncodeData& data, Step step, void* scratch, void* records, int64_t i0, int64_t i1) {    \
    isa::encoder::encode_step(e, data, step, scratch, records, i0, i1);                                                             \
  }
