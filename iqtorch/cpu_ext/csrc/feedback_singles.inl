// Rounding of a group of columns for codebooks of single values: several scales (minima, variants) at a time, which hides the latency of
// each column waiting for the one before; the one that cost least is then walked again. Part of feedback.inl.

// Scale, offset and shift of the values, as each lane has them: weights are s * (value of the table + shift) - low.
struct Candidate {
  F s, low, shift;
  I rank, low_rank, kind;
};

constexpr int kTogether = 4;

template <class Near, bool PARITY> struct Singles {
  const FeedbackData& b;
  const Near near;

  explicit Singles(const FeedbackData& b) : b(b), near(b.values) {}

  // What the group on hand is given: targets and weights [n][lanes], where its lanes lie, and whether a column is the last of its word.
  struct Group {
    int64_t first, row, lanes;
    const float *x, *w;
    bool last[kMaxGroup];
  };

  Candidate candidate(int64_t i, int64_t own, int64_t lanes, I rank0, I low0) const {
    const Scales &scale = b.scale, &minimum = b.minimum;
    const int64_t mi = i % minimum.steps, si = i / minimum.steps % scale.steps, kind = i / minimum.steps / scale.steps;
    Candidate c;
    c.kind = seti((int32_t)kind), c.shift = set(b.values.shift[kind]);
    c.rank = gather(scale.near + si * scale.count, rank0);
    c.s = load_lanes(scale.unit + si * scale.stride + own, lanes) * gather(scale.value, c.rank);
    c.low = set(0), c.low_rank = seti(0);
    if (minimum.unit) {
      c.low_rank = gather(minimum.near + mi * minimum.count, low0);
      c.low = load_lanes(minimum.unit + mi * minimum.stride + own, lanes) * gather(minimum.value, c.low_rank);
    }
    return c;
  }

  // Rounds the columns of the group with C candidates; their errors go to `error` [n][C][lanes]. `KEEP` writes all results.
  template <int C, bool KEEP> void walk(const Group& g, const Candidate* c, F* cost, float* error) const {
    const int n = (int)b.group;
    F inverse[C];
    I odd[C][PARITY ? kMaxGroup : 1];
    for (int i = 0; i < C; ++i) {
      inverse[i] = select(less(max(c[i].s, set(0) - c[i].s), set(1e-36f)), set(0), set(1) / c[i].s), cost[i] = set(0);
      if (PARITY) for (int k = 0; k < n; ++k) odd[i][k] = seti(0);
    }
    for (int j = 0; j < n; ++j) {
      const float* before = b.lower + (g.first + j) * b.columns + g.first;
      const F target = load(g.x + j * L);
      F t[C], more[C];
      for (int i = 0; i < C; ++i) t[i] = target + c[i].low, more[i] = set(0);
      int k = 0;
      for (; k + 2 <= j; k += 2) {
        const F p = set(before[k]), q = set(before[k + 1]);
        for (int i = 0; i < C; ++i) {
          t[i] = fma(load(error + (k * C + i) * L), p, t[i]), more[i] = fma(load(error + ((k + 1) * C + i) * L), q, more[i]);
        }
      }
      if (k < j) for (int i = 0; i < C; ++i) t[i] = fma(load(error + (k * C + i) * L), set(before[k]), t[i]);
      const F form = set(b.form[g.first + j]), weight = load(g.w + j * L);
      for (int i = 0; i < C; ++i) {
        t[i] = t[i] + more[i];
        const F y = t[i] * inverse[i] - c[i].shift;
        F value = near(y);
        I code = seti(0);
        if (PARITY || KEEP) code = gather(b.values.code, truncate(value - set(b.values.low)));
        value = value + c[i].shift;
        if (PARITY) {
          I& word = odd[i][b.word[g.first + j]];
          word = word + gather(b.odd, code);
          if (g.last[j]) {  // makes the parity even
            const M wrong = encoder::odd(word);
            const I other = gather(b.other, cell_of(b.values.cells, y + y));
            value = select(wrong, gather(b.book, other) + c[i].shift, value), code = select(wrong, other, code);
          }
        }
        const F left = t[i] - c[i].s * value, off = weight + c[i].low - c[i].s * value;
        cost[i] = fma(form * left, left, cost[i]);
        store(error + (j * C + i) * L, off);
        if (KEEP) {
          const int64_t at = (g.first + j) * b.rows + g.row;
          store_lanes(b.x + at, left, g.lanes), store_lanes(b.value + at, value, g.lanes), store_lanes(b.error + at, off, g.lanes);
          store_lanes(b.code + at, code, g.lanes);
        }
      }
    }
  }

  void operator()(int64_t group, int64_t row, int64_t lanes, const float* x, const float* w, float* kept) const {
    const int64_t n = b.group, own = group * b.rows + row;
    Group g{group * n, row, lanes, x, w, {}};
    for (int64_t j = 0; PARITY && j < n; ++j) {
      g.last[j] = true;
      for (int64_t k = j + 1; k < n; ++k) g.last[j] &= b.word[g.first + k] != b.word[g.first + j];
    }
    const I rank0 = load_lanes(b.scale.rank + own, lanes), low0 = b.minimum.unit ? load_lanes(b.minimum.rank + own, lanes) : seti(0);
    const int64_t count = b.kinds * b.scale.steps * b.minimum.steps;
    float error[kMaxGroup * kTogether * L];
    Candidate best = candidate(0, own, lanes, rank0, low0);  // whatever its cost: a NaN is never lower
    F least = set(__builtin_inff());
    const auto try_some = [&](auto together, int64_t i) {
      constexpr int C = decltype(together)::value;
      Candidate c[C];
      F cost[C];
      for (int k = 0; k < C; ++k) c[k] = candidate(i + k < count ? i + k : count - 1, own, lanes, rank0, low0);
      walk<C, false>(g, c, cost, error);
      for (int k = 0; k < C; ++k) {
        const M lower = less(cost[k], least);
        least = select(lower, cost[k], least);
        best.s = select(lower, c[k].s, best.s), best.low = select(lower, c[k].low, best.low);
        best.shift = select(lower, c[k].shift, best.shift), best.rank = select(lower, c[k].rank, best.rank);
        best.low_rank = select(lower, c[k].low_rank, best.low_rank), best.kind = select(lower, c[k].kind, best.kind);
      }
    };
    int64_t i = 0;
    if (count % kTogether == 3) try_some(std::integral_constant<int, 3>{}, 0), i = 3;
    for (; i < count; i += kTogether) try_some(std::integral_constant<int, kTogether>{}, i);
    walk<1, true>(g, &best, &least, kept);
    store_lanes(b.scale.rank + own, best.rank, lanes), store_lanes(b.kind + own, best.kind, lanes);
    if (b.minimum.unit) store_lanes(b.minimum.rank + own, best.low_rank, lanes);
  }
};
