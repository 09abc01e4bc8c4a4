// Nearest entries of codebooks of vectors, for many groups at a time. Part of encode.inl.

// Queries are padded to whole batches.
IQ_FN int query_stride(int queries) { return (queries + 31) / 32 * 32; }

// Sixteen queries at a time against every entry: sum over the vector of (a + b c) c, with a = -2 w x and b = s w.
template <int V> void Search::full_search(int queries, int variant) {
  const float* book = f.book + (size_t)variant * f.i.entries * V;
  const int stride = query_stride(queries);
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

// The same for codebooks of vectors put together from few halves: the scores of the halves of all entries (each again the sum of two
// quarters) are found first; then for each first half the best of the second halves that go with it.
template <int V> void Search::halves_search(int queries, int variant) {
  constexpr int W = V / 4;  // values of a quarter
  const HalfTables& t = f.halves;
  const int stride = query_stride(queries);
  const int32_t* count = t.count + 16 * variant;
  const int32_t *parts[2] = {t.parts + variant * 4 * kMostHalves, t.parts + (variant * 2 + 1) * 2 * kMostHalves};
  const int32_t* first = t.first + variant * (kMostHalves + 16);
  const size_t room = f.i.entries + 4 * kMostHalves;
  const int32_t *second = t.second + variant * room, *entry = t.entry + variant * room;
  constexpr int S = 32;  // queries at a time, in two vectors
  float* scores[2] = {half_scores, half_scores + kMostHalves * S};
  for (int q = 0; q < queries; q += S) {
    float quarter[4][kMostQuarters * S];
    for (int k = 0; k < 4; ++k)
      for (int e = 0; e < count[k]; ++e) {
        const float* c = t.quarters + ((variant * 4 + k) * kMostQuarters + e) * W;
        for (int u = 0; u < S; u += 16) {
          F score = set(0);
          for (int i = 0; i < W; ++i) {
            const int at = (k * W + i) * stride + q + u;
            score = fma(fma(load(query_b + at), set(c[i]), load(query_a + at)), set(c[i]), score);
          }
          store(quarter[k] + S * e + u, score);
        }
      }
    for (int h = 0; h < 2; ++h)
      for (int e = 0; e < count[4 + h]; ++e)
        for (int u = 0; u < S; u += 16)
          store(scores[h] + S * e + u, load(quarter[2 * h] + S * parts[h][2 * e] + u) + load(quarter[2 * h + 1] + S * parts[h][2 * e + 1] + u));
    F best[2] = {set(kInfinity), set(kInfinity)}, best_second[2] = {best[0], best[0]};
    I best_first[2] = {seti(0), seti(0)};
    for (int e = 0; e < count[4]; ++e) {
      F lowest = set(kInfinity), lowest2 = lowest;
      for (int p = first[e]; p < first[e + 1]; p += 4) {
        const float *a = scores[1] + second[p], *b = scores[1] + second[p + 1], *c = scores[1] + second[p + 2], *d = scores[1] + second[p + 3];
        lowest = min(lowest, min(min(load(a), load(b)), min(load(c), load(d))));
        lowest2 = min(lowest2, min(min(load(a + 16), load(b + 16)), min(load(c + 16), load(d + 16))));
      }
      const F found[2] = {lowest, lowest2};
      for (int u = 0; u < 2; ++u) {
        const F score = load(scores[0] + S * e + 16 * u) + found[u];
        const M lower = less(score, best[u]);
        best[u] = select(lower, score, best[u]), best_second[u] = select(lower, found[u], best_second[u]);
        best_first[u] = select(lower, seti(e), best_first[u]);
      }
    }
    float wanted[S];
    int32_t of[S];
    for (int u = 0; u < 2; ++u) store(wanted + 16 * u, best_second[u]), store(of + 16 * u, best_first[u]);
    for (int l = 0; l < S && q + l < queries; ++l) {
      int p = first[of[l]];
      while (p < first[of[l] + 1] - 1 && scores[1][second[p] + l] != wanted[l]) ++p;
      query_code[q + l] = entry[p];
    }
  }
}

template <int V> void Search::grid(int items, int variant) {
  const int per = n / V, queries = items * per, stride = query_stride(queries);
  for (int it = 0; it < items; ++it) {
    const float* w = item_w[it];
    const float scale = scales[it] < 0 ? -scales[it] : scales[it], sign = scales[it] < 0 ? -1.0f : 1.0f;
    for (int j = 0; j < n; ++j) target[j] = item_x[it][j] * sign;
    if (f.i.signs != kUnsigned) signs(target, w, f.smallest * scale, negative + it * n);
    for (int i = 0; i < V; ++i)
      for (int q = 0; q < per; ++q) {
        query_a[i * stride + it * per + q] = -2 * w[q * V + i] * target[q * V + i];
        query_b[i * stride + it * per + q] = scale * w[q * V + i];
      }
  }
  for (int i = 0; i < V; ++i)
    for (int q = queries; q < stride; ++q) query_a[i * stride + q] = query_b[i * stride + q] = 0;
  if constexpr (V >= 4) halves_search<V>(queries, variant);
  else full_search<V>(queries, variant);
  for (int q = 0; q < queries; ++q) code[q] = query_code[q];
}

// Position by position, so that one set of boxes at a time is in the cache.
template <int V> void Search::boxed(Boxes<V>* boxes, int items, int variant) {
  const int per = n / V;
  for (int it = 0; it < items; ++it) {
    const float scale = scales[it] < 0 ? -scales[it] : scales[it], sign = scales[it] < 0 ? -1.0f : 1.0f;
    for (int j = 0; j < n; ++j) value[it * n + j] = item_x[it][j] * sign;  // values take their places later
    if (f.i.signs != kUnsigned) signs(value + it * n, item_w[it], f.smallest * scale, negative + it * n);
  }
  for (int p = 0; p < per; ++p) {
    Boxes<V>& box = boxes[variant * per + p];
    box.build(f, variant, item_w[0] + p * V);
    const float* targets = value + p * V;
    for (int it = 0; depth < 1 && it < items; it += 16)
      box.near(targets + it * n, n, scales + it, items - it < 16 ? items - it : 16, depth, code + it * per + p, per);
    for (int it = 0; depth == 1 && it < items; ++it)
      code[it * per + p] = box.nearest(targets + it * n, scales[it] < 0 ? -scales[it] : scales[it], item_warm[it] ? item_warm[it][p] : -1);
  }
}

// Leaves magnitudes in `target`, signs in `minus`; with even parity, of each eight the sign that costs least to turn is turned.
void Search::signs(float* target, const float* w, float low, uint8_t* minus) {
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

void Search::find(int items, int variant) {
  if (f.i.box_bits) f.i.vec == 4 ? boxed<4>(boxes4, items, variant) : boxed<8>(boxes8, items, variant);
  else f.i.vec == 2 ? grid<2>(items, variant) : f.i.vec == 4 ? grid<4>(items, variant) : grid<8>(items, variant);
  const int vec = f.i.vec, queries = items * (n / vec);
  const float* book = f.book + (size_t)variant * f.i.entries * vec;
  for (int q = 0; q < queries; ++q) __builtin_memcpy(value + q * vec, book + (size_t)code[q] * vec, 4 * vec);
  if (f.i.signs != kUnsigned)
    for (int j = 0; j < items * n; ++j) value[j] = negative[j] ? -value[j] : value[j];
}
