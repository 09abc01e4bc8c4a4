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

// The best entry of [first, last) for each lane: score = s * square + sum u value.
template <int V> IQ_FN I best_entry(const float* book, const float* square, int64_t first, int64_t last, F s, const F* u) {
  F least = set(__builtin_inff());
  I best{};
  for (int64_t e = first; e < last; ++e) {
    F score = s * square[e];
    for (int i = 0; i < V; ++i) score = fma(u[i], set(book[e * V + i]), score);
    const I better = score < least;
    least = better ? score : least;
    best = better ? seti((int32_t)e) : best;
  }
  return best;
}

template <int V> IQ_FN F form_of(const float* form, const F* e) {
  F total{};
  for (int i = 0; i < V; ++i) {
    F row = e[0] * form[i * V];
    for (int k = 1; k < V; ++k) row = fma(e[k], set(form[i * V + k]), row);
    total = fma(row, e[i], total);
  }
  return total;
}

template <int V> IQ_FN void take_entry(const FeedbackData& b, int kind, int64_t step, F s, const F* t, Step<V>& found) {
  const float *form = b.form + step * V * V, *book = b.book + kind * b.entries * V;
  const F size = magnitude(s), minus_two = (F)((I)set(-2.0f) ^ sign_bit(s));
  F u[V];
  for (int i = 0; i < V; ++i) {
    F row = t[0] * form[i * V];
    for (int k = 1; k < V; ++k) row = fma(t[k], set(form[i * V + k]), row);
    u[i] = row * minus_two;
  }
  found.code = best_entry<V>(book, b.square + (step * b.kinds + kind) * b.entries, 0, b.entries, size, u);
  for (int i = 0; i < V; ++i) found.value[i] = gather(book + i, found.code * V);
}

// Magnitudes with separate signs: the best entry of each slice of the codebook by the diagonal of the form, then each of these with
// its best signs by the whole form.
template <int V> static void take_signed(const FeedbackData& b, int64_t step, F s, const F* t, bool closes, I& parity, Step<V>& found) {
  const float *form = b.form + step * V * V, *square = b.square + step * b.entries;
  const F size = magnitude(s);
  F u[V];
  for (int i = 0; i < V; ++i) u[i] = magnitude(t[i]) * (-2.0f * form[i * V + i]);
  const int64_t slices = b.shortlist < b.entries ? b.shortlist : b.entries, width = b.entries / slices;
  F least = set(__builtin_inff());
  I odd_found{};
  for (int64_t c = 0; c < slices; ++c) {
    const I entry = best_entry<V>(b.book, square, c * width, (c + 1) * width, size, u);
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
    found.code = better || c == 0 ? entry : found.code;
    for (int i = 0; i < V; ++i) found.value[i] = better || c == 0 ? value[i] : found.value[i];
  }
  parity = odd_found;
}

// One group of one tile. `x` holds the targets of the group's columns with all feedback from before the group.
template <int V>
static void round_group(const FeedbackData& b, int64_t group, int64_t row, int64_t lanes, const F* x, const F* w, F* kept) {
  const int64_t n = b.group, a = group * n;
  const int64_t own = group * b.rows + row;
  const Scales &scale = b.scale, &minimum = b.minimum;
  const I rank0 = load<I>(scale.rank + own, lanes);
  const I low0 = minimum.unit ? load<I>(minimum.rank + own, lanes) : I{};
  F least = set(__builtin_inff());
  I rank_kept{}, low_kept{}, kind_kept{}, code_kept[kMaxGroup];
  F value_kept[kMaxGroup], left_kept[kMaxGroup];
  for (int kind = 0; kind < b.kinds; ++kind)
    for (int64_t si = 0; si < scale.steps; ++si)
      for (int64_t mi = 0; mi < minimum.steps; ++mi) {
        const I rank = gather(scale.near + si * scale.count, rank0);
        const F s = load<F>(scale.unit + si * scale.stride + own, lanes) * gather(scale.value, rank);
        I low_rank{};
        F low{};
        if (minimum.unit) {
          low_rank = gather(minimum.near + mi * minimum.count, low0);
          low = load<F>(minimum.unit + mi * minimum.stride + own, lanes) * gather(minimum.value, low_rank);
        }
        F cost{}, error[kMaxGroup], left[kMaxGroup], value[kMaxGroup];
        I code[kMaxGroup];
        I parity{};
        for (int64_t j = 0; j < n; j += V) {
          const int64_t step = (a + j) / V;
          Step<V> found;
          F t[V];
          for (int i = 0; i < V; ++i) {
            const float* before = b.lower + (a + j + i) * b.columns + a;
            F even = x[j + i] + low, odd{};
            int64_t k = 0;
            for (; k + 2 <= j; k += 2) even = fma(error[k], set(before[k]), even), odd = fma(error[k + 1], set(before[k + 1]), odd);
            if (k < j) even = fma(error[k], set(before[k]), even);
            t[i] = even + odd;
          }
          if (b.signs == kUnsigned)
            take_entry<V>(b, kind, step, s, t, found);
          else
            take_signed<V>(b, step, s, t, (j + V) % 8 == 0, parity, found);
          for (int i = 0; i < V; ++i) {
            left[j + i] = t[i] - s * found.value[i];
            error[j + i] = w[j + i] + low - s * found.value[i];
            value[j + i] = found.value[i];
          }
          code[j / V] = found.code;
          cost += form_of<V>(b.form + step * V * V, left + j);
        }
        const I better = cost < least;
        const bool first = !kind && !si && !mi;  // whatever its cost: a NaN is never lower
        const I take = first ? seti(-1) : better;
        least = take ? cost : least;
        rank_kept = take ? rank : rank_kept, low_kept = take ? low_rank : low_kept, kind_kept = take ? seti(kind) : kind_kept;
        for (int64_t j = 0; j < n; ++j) {
          kept[j] = take ? error[j] : kept[j];
          left_kept[j] = take ? left[j] : left_kept[j];
          value_kept[j] = take ? value[j] : value_kept[j];
        }
        for (int64_t j = 0; j < n / V; ++j) code_kept[j] = take ? code[j] : code_kept[j];
      }
  store(scale.rank + own, rank_kept, lanes);
  if (minimum.unit) store(minimum.rank + own, low_kept, lanes);
  store(b.kind + own, kind_kept, lanes);
  for (int64_t j = 0; j < n; ++j) {
    store(b.x + (a + j) * b.rows + row, left_kept[j], lanes);
    store(b.value + (a + j) * b.rows + row, value_kept[j], lanes);
    store(b.error + (a + j) * b.rows + row, kept[j], lanes);
  }
  for (int64_t j = 0; j < n / V; ++j) store(b.code + (a / V + j) * b.rows + row, code_kept[j], lanes);
}

template <int V> struct Vectors {
  const FeedbackData& b;

  void operator()(int64_t group, int64_t row, int64_t lanes, const float* x, const float* w, float* kept) const {
    round_group<V>(b, group, row, lanes, (const F*)x, (const F*)w, (F*)kept);
  }
};

}  // namespace vectors
