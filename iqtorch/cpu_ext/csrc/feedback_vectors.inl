// Rounding of a group of columns for codebooks of vectors, one row in each lane of a compiler vector: all entries are compared by the whole
// quadratic form of the step. Part of feedback.inl.
namespace vectors {

typedef float F __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));

IQ_FN F set(float c) { return F{} + c; }
IQ_FN I seti(int32_t c) { return I{} + c; }
IQ_FN F magnitude(F a) { return (F)((I)a & 0x7fffffff); }
IQ_FN I sign_bit(F a) { return (I)a & (int32_t)0x80000000; }
IQ_FN F fma(F a, F b, F c) { return a * b + c; }

IQ_FN F gather(const float* p, I n) {
#if defined(__AVX512F__)
  return (F)_mm512_i32gather_ps((__m512i)n, p, 4);
#else
  F r;
  for (int i = 0; i < L; ++i) r[i] = p[n[i]];
  return r;
#endif
}
IQ_FN I gather(const int32_t* p, I n) {
#if defined(__AVX512F__)
  return (I)_mm512_i32gather_epi32((__m512i)n, p, 4);
#else
  I r;
  for (int i = 0; i < L; ++i) r[i] = p[n[i]];
  return r;
#endif
}

// Columns of a tile; lanes beyond the last row hold zeros and are not written.
template <class V, class T> IQ_FN V load(const T* p, int64_t lanes) {
  V r{};
  if (lanes == L) __builtin_memcpy(&r, p, sizeof(r));
  else for (int i = 0; i < lanes; ++i) r[i] = p[i];
  return r;
}
template <class V, class T> IQ_FN void store(T* p, V v, int64_t lanes) {
  if (lanes == L) __builtin_memcpy(p, &v, sizeof(v));
  else for (int i = 0; i < lanes; ++i) p[i] = v[i];
}

// What a step takes: code and values for each lane.
template <int V> struct Step {
  I code;
  F value[V];
};

IQ_FN F lower(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// The best entries of [first, last) for C scales, for each lane: score = s * square + sum u value. Codebooks of many entries are searched
// eight entries at a time for the eight with the lowest score, and then these: a minimum is one instruction, keeping the index two more.
template <int V, int C>
IQ_FN void best_entries(const float* book, const float* square, int64_t first, int64_t last, const F* s, const F (*u)[V], I* best) {
  constexpr int kPart = 8;
  F least[C];
  for (int c = 0; c < C; ++c) least[c] = set(__builtin_inff()), best[c] = seti((int32_t)first);
  const auto keep = [&](int c, F now, I e) {
    const I better = now < least[c];
    least[c] = better ? now : least[c];
    best[c] = better ? e : best[c];
  };
  const auto scores = [&](int64_t e, F* sum) {
    for (int c = 0; c < C; ++c) sum[c] = s[c] * square[e];
    for (int i = 0; i < V; ++i) {
      const F value = set(book[e * V + i]);
      for (int c = 0; c < C; ++c) sum[c] = fma(u[c][i], value, sum[c]);
    }
  };
  if (V < 4 || (last - first) % kPart || last - first < 512) {
    for (int64_t e = first; e < last; ++e) {
      F now[C];
      scores(e, now);
      for (int c = 0; c < C; ++c) keep(c, now[c], seti((int32_t)e));
    }
    return;
  }
  for (int64_t e = first; e < last; e += kPart) {
    F now[C], more[C];
    scores(e, now);
    for (int k = 1; k < kPart; ++k) {
      scores(e + k, more);
      for (int c = 0; c < C; ++c) now[c] = lower(more[c], now[c]);
    }
    for (int c = 0; c < C; ++c) keep(c, now[c], seti((int32_t)e));
  }
  for (int c = 0; c < C; ++c) {
    const I part = best[c];
    least[c] = set(__builtin_inff());
    for (int k = 0; k < kPart; ++k) {
      const I e = part + k;
      F now = s[c] * gather(square, e);
      for (int i = 0; i < V; ++i) now = fma(u[c][i], gather(book + i, e * V), now);
      keep(c, now, e);
    }
  }
}

#include "feedback_tiles.inl"

template <int V> IQ_FN F form_of(const float* form, const F* e) {
  F total{};
  for (int i = 0; i < V; ++i) {
    F row = e[0] * form[i * V];
    for (int k = 1; k < V; ++k) row = fma(e[k], set(form[i * V + k]), row);
    total = fma(row, e[i], total);
  }
  return total;
}

template <int V, int C> IQ_FN void take_entries(const FeedbackData& b, int kind, int64_t step, const F* s, const F (*t)[V], Step<V>* found) {
  const float *form = b.form + step * V * V, *book = b.book + kind * b.entries * V;
  F size[C], u[C][V];
  I code[C];
  for (int c = 0; c < C; ++c) {
    const F minus_two = (F)((I)set(-2.0f) ^ sign_bit(s[c]));
    size[c] = magnitude(s[c]);
    for (int i = 0; i < V; ++i) {
      F row = t[c][0] * form[i * V];
      for (int k = 1; k < V; ++k) row = fma(t[c][k], set(form[i * V + k]), row);
      u[c][i] = row * minus_two;
    }
  }
  const float* square = b.square + (step * b.kinds + kind) * b.entries;
  const auto search = [&] {
#if defined(__AVX512VNNI__)
    if constexpr (V == 8)
      if (b.bytes) return best_by_bytes<C>(b, kind, square, 0, b.entries, b.entries < 32768 ? 8 : 16, size, u, code);
#endif
    if constexpr (V == 4)
      if (b.cuts) return best_of_cells<C>(b, kind, square, s, t, u, code);
    best_entries<V, C>(book, square, 0, b.entries, size, u, code);
  };
  search();
  for (int c = 0; c < C; ++c) {
    found[c].code = code[c];
    for (int i = 0; i < V; ++i) found[c].value[i] = gather(book + i, code[c] * V);
  }
}

// Magnitudes with separate signs: an entry with its best signs by the whole form, if that is better than what was found before.
template <int V>
static void take_signs(const FeedbackData& b, int64_t step, F s, const F* t, bool closes, I entry, I parity, F& least, I& odd_found, Step<V>& found) {
  const float* form = b.form + step * V * V;
  F value[V], error[V], pull[V];
  for (int i = 0; i < V; ++i) {
    value[i] = (F)((I)gather(b.book + i, entry * V) ^ sign_bit(t[i]) ^ sign_bit(s));
    error[i] = t[i] - s * value[i];
  }
  for (int i = 0; i < V; ++i) {
    pull[i] = error[0] * form[i * V];
    for (int k = 1; k < V; ++k) pull[i] = fma(error[k], set(form[i * V + k]), pull[i]);
  }
  const auto gain = [&](int i) { return 4.0f * s * value[i] * (pull[i] + s * value[i] * form[i * V + i]); };
  const auto turn = [&](int i, I where) {
    const F change = where ? 2.0f * s * value[i] : F{};
    error[i] += change;
    for (int k = 0; k < V; ++k) pull[k] = fma(change, set(form[k * V + i]), pull[k]);
    value[i] = where ? -value[i] : value[i];
  };
  for (int i = 0; i < V; ++i) turn(i, gain(i) < 0.0f);
  I odd = parity;
  if (b.signs == kEven) {
    for (int i = 0; i < V; ++i) odd = odd ^ (((I)value[i] >> 31) & 1);
    if (closes) {
      F cheapest = gain(0);
      I which{};
      for (int i = 1; i < V; ++i) {
        const F g = gain(i);
        which = g < cheapest ? seti(i) : which;
        cheapest = g < cheapest ? g : cheapest;
      }
      for (int i = 0; i < V; ++i) turn(i, (odd != 0) & (which == i));
      odd = I{};
    }
  }
  const F cost = form_of<V>(form, error);
  const I better = cost < least;
  least = better ? cost : least;
  odd_found = better ? odd : odd_found;
  found.code = better ? entry : found.code;
  for (int i = 0; i < V; ++i) found.value[i] = better ? value[i] : found.value[i];
}

// The best entry of each slice of the codebook by the diagonal of the form, then the best of these with their signs.
template <int V, int C>
IQ_FN void take_signed(const FeedbackData& b, int64_t step, const F* s, const F (*t)[V], bool closes, I* parity, Step<V>* found) {
  const float *form = b.form + step * V * V, *square = b.square + step * b.entries;
  F size[C], u[C][V], least[C];
  I odd[C];
  for (int c = 0; c < C; ++c) {
    size[c] = magnitude(s[c]), least[c] = set(__builtin_inff()), odd[c] = I{}, found[c].code = I{};
    for (int i = 0; i < V; ++i) u[c][i] = magnitude(t[c][i]) * (-2.0f * form[i * V + i]), found[c].value[i] = set(b.book[i]);
  }
  const int64_t slices = b.shortlist < b.entries ? b.shortlist : b.entries, width = b.entries / slices;
  for (int64_t slice = 0; slice < slices; ++slice) {
    I entry[C];
    const int64_t first = slice * width, last = first + width;
#if defined(__AVX512VNNI__)
    if constexpr (V == 8)
      if (b.bytes) best_by_bytes<C>(b, 0, square, first, last, 1, size, u, entry);
    if (V != 8 || !b.bytes)
#endif
    best_entries<V, C>(b.book, square, first, last, size, u, entry);
    for (int c = 0; c < C; ++c) take_signs<V>(b, step, s[c], t[c], closes, entry[c], parity[c], least[c], odd[c], found[c]);
  }
  for (int c = 0; c < C; ++c) parity[c] = odd[c];
}

// What was found for a group: ranks of the scale and variant, and per column (or step) codes, values, errors, and what is left.
struct Kept {
  F least, value[kMaxGroup], left[kMaxGroup];
  I rank, kind, code[kMaxGroup];
};

// Rounds the columns of a group of a tile with C scales from the `first` on and keeps what cost less than what was kept. `x` holds the
// targets of the group's columns with all feedback from before the group.
template <int V, int C>
static void walk(const FeedbackData& b, int64_t a, int64_t own, int64_t lanes, int kind, int64_t first, I rank0, const F* x, const F* w, F* kept_error,
                 Kept& kept) {
  const Scales& scale = b.scale;
  const int64_t n = b.group;
  I rank[C], parity[C], code[C][kMaxGroup];
  F s[C], cost[C], error[kMaxGroup][C], left[C][kMaxGroup], value[C][kMaxGroup];
  for (int c = 0; c < C; ++c) {
    rank[c] = gather(scale.near + (first + c) * scale.count, rank0), parity[c] = I{}, cost[c] = F{};
    s[c] = load<F>(scale.unit + (first + c) * scale.stride + own, lanes) * gather(scale.value, rank[c]);
  }
  for (int64_t j = 0; j < n; j += V) {
    const int64_t step = (a + j) / V;
    Step<V> found[C];
    F t[C][V];
    for (int i = 0; i < V; ++i) {
      const float* before = b.lower + (a + j + i) * b.columns + a;
      for (int c = 0; c < C; ++c) t[c][i] = x[j + i];
      for (int64_t k = 0; k < j; ++k) {
        const F with = set(before[k]);
        for (int c = 0; c < C; ++c) t[c][i] = fma(error[k][c], with, t[c][i]);
      }
    }
    if (b.signs == kUnsigned) take_entries<V, C>(b, kind, step, s, t, found);
    else take_signed<V, C>(b, step, s, t, (j + V) % 8 == 0, parity, found);
    for (int c = 0; c < C; ++c) {
      for (int i = 0; i < V; ++i) {
        left[c][j + i] = t[c][i] - s[c] * found[c].value[i];
        error[j + i][c] = w[j + i] - s[c] * found[c].value[i];
        value[c][j + i] = found[c].value[i];
      }
      code[c][j / V] = found[c].code;
      cost[c] += form_of<V>(b.form + step * V * V, left[c] + j);
    }
  }
  for (int c = 0; c < C; ++c) {
    const bool only = !kind && !first && !c;  // whatever its cost: a NaN is never lower
    const I take = only ? seti(-1) : cost[c] < kept.least;
    kept.least = take ? cost[c] : kept.least;
    kept.rank = take ? rank[c] : kept.rank, kept.kind = take ? seti(kind) : kept.kind;
    for (int64_t j = 0; j < n; ++j) {
      kept_error[j] = take ? error[j][c] : kept_error[j];
      kept.left[j] = take ? left[c][j] : kept.left[j];
      kept.value[j] = take ? value[c][j] : kept.value[j];
    }
    for (int64_t j = 0; j < n / V; ++j) kept.code[j] = take ? code[c][j] : kept.code[j];
  }
}

template <int V> static void round_group(const FeedbackData& b, int64_t group, int64_t row, int64_t lanes, const F* x, const F* w, F* error) {
  const int64_t n = b.group, a = group * n, own = group * b.rows + row, steps = b.scale.steps;
  const I rank0 = load<I>(b.scale.rank + own, lanes);
  Kept kept;
  for (int kind = 0; kind < b.kinds; ++kind)
    for (int64_t i = 0; i < steps; i += 3) {  // more would not fit into the registers
      const auto run = [&](auto count) { walk<V, decltype(count)::value>(b, a, own, lanes, kind, i, rank0, x, w, error, kept); };
      if (steps - i >= 3) run(std::integral_constant<int, 3>());
      else if (steps - i == 2) run(std::integral_constant<int, 2>());
      else run(std::integral_constant<int, 1>());
    }
  store(b.scale.rank + own, kept.rank, lanes), store(b.kind + own, kept.kind, lanes);
  for (int64_t j = 0; j < n; ++j) {
    store(b.x + (a + j) * b.rows + row, kept.left[j], lanes);
    store(b.value + (a + j) * b.rows + row, kept.value[j], lanes);
    store(b.error + (a + j) * b.rows + row, error[j], lanes);
  }
  for (int64_t j = 0; j < n / V; ++j) store(b.code + (a / V + j) * b.rows + row, kept.code[j], lanes);
}

template <int V> struct Vectors {
  const FeedbackData& b;

  void operator()(int64_t group, int64_t row, int64_t lanes, const float* x, const float* w, float* kept) const {
    round_group<V>(b, group, row, lanes, (const F*)x, (const F*)w, (F*)kept);
  }
};

}  // namespace vectors
