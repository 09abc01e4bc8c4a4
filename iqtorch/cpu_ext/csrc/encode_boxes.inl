// Nearest entries of a large codebook (trellis formats: up to 65536 entries of 4 or 8 values), exact, without scoring them all.
//
// All rows share the error weights of a column. So the entries are sorted, once per vector of columns, into boxes: each coordinate is
// cut at its quantiles, more finely the more it weighs. The error of an entry is at least the distance of its box,
// sum of w_i dist(y_i, interval_i)^2, and boxes beyond the best error so far need not be opened. Entries are compared by integer
// products of their bytes with a 16-bit query; those that could be the best are compared again in float. Part of encode.inl.

constexpr int kLevels = 16, kSide = 32, kMaxSums = 64;  // quantiles; intervals of a side and their combinations, at most
constexpr int kCandidates = 64;

constexpr float kFarthest = 1e5f;  // beyond, the scale is too small to be chosen
constexpr int kMaxBoxes = 1 << kMaxBoxBits, kMaxVectors = kMaxBoxEntries / 16 + kMaxBoxes;
constexpr int32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Scores of 16 entries at p (as in `entry`): the products of their bytes with the query -2 w y, in steps, and their norms. The query is 256
// times the signed bytes `upper` plus the bytes `lower`, four of them to a word and `next` words from word to word.
template <int V> IQ_FN F score16(const int32_t* p, const int32_t* upper, const int32_t* lower, int next, I start, float step) {
  I total = seti(0);
  for (int k = 0; k < V / 4; ++k) total = dot4(total, load(p + 16 * k), seti(upper[k * next]));
  total = times256(total) + start;
  for (int k = 0; k < V / 4; ++k) total = dot4(total, load(p + 16 * k), seti(lower[k * next]));
  return fma(set(step), to_float(total), load((const float*)p + 4 * V));
}

template <int V> struct Boxes {
  static constexpr int kStride = 16 * (V / 4 + 1);  // ints per vector of 16 entries: bytes by fours, then norms

  const int32_t* bytes;
  float w[16], minus_2w[16];  // zeros above V
  // The number of a box has the digits (intervals of cut coordinates) of a high and of a low side.
  int dims[2], intervals[2], count[2];       // of a side: coordinates, their intervals, and combinations of these
  float low[2 * kSide], high[2 * kSide], weight[2 * kSide];  // by interval; the low side's first
  int32_t axis[2 * kSide];
  int32_t interval[2][V][kMaxSums];          // of each combination, for each coordinate of the side
  float padding[2][kMaxSums];                // infinite for combinations that do not exist
  int32_t *first, *entry, *code, *cell;
  bool built;

  static size_t cells(const Encoder& e) { return (size_t)1 << e.i.box_bits; }
  static size_t vectors(const Encoder& e) { return e.i.entries / 16 + cells(e); }
  void prepare(const Encoder& e, Memory& m) {
    first = m.ints(cells(e) + 1), entry = m.ints(vectors(e) * kStride), code = m.ints(vectors(e) * 16), cell = m.ints(e.i.entries);
    built = false;
  }

  void build(const Encoder& e, int variant, const float* weights);
  void cut(const Encoder& e, int variant);
  template <int STEP> float exact(F a, const int32_t* p) const;
  void near(const float* targets, int stride, const float* scales, int items, float depth, int32_t* codes, int code_stride) const;
  int nearest(const float* target, float scale, int warm) const;
};

// Which coordinates are cut how often; intervals of the sides, and the box of each entry.
template <int V> void Boxes<V>::cut(const Encoder& e, int variant) {
  int bits[V] = {}, by_bits[V];
  float span[V];
  for (int i = 0; i < V; ++i) span[i] = w[i];
  for (int b = 0; b < e.i.box_bits; ++b) {
    int most = 0;
    for (int i = 1; i < V; ++i)
      if (span[i] > span[most]) most = i;
    span[most] = 1 << ++bits[most] < kLevels ? span[most] * 0.25f : -1.0f;
  }
  for (int i = 0; i < V; ++i) {
    int at = i;
    for (; at > 0 && bits[by_bits[at - 1]] < bits[i]; --at) by_bits[at] = by_bits[at - 1];
    by_bits[at] = i;
  }
  int sides[2][V], sum[2] = {0, 0};
  dims[0] = dims[1] = 0;
  for (int i = 0; i < V && bits[by_bits[i]]; ++i) {
    const int side = sum[1] < sum[0];
    sides[side][dims[side]++] = by_bits[i], sum[side] += bits[by_bits[i]];
  }
  if (sum[1] > sum[0]) {  // the low side, which is compared by vectors, is the larger one
    for (int i = 0; i < V; ++i) { const int t = sides[0][i]; sides[0][i] = sides[1][i], sides[1][i] = t; }
    int t = sum[0];
    sum[0] = sum[1], sum[1] = t, t = dims[0], dims[0] = dims[1], dims[1] = t;
  }
  const int32_t* ranks = e.boxes.rank + (size_t)variant * e.i.entries;
  const int entries = e.i.entries;
  int32_t* const to = cell;
  for (int c = 0; c < entries; ++c) to[c] = 0;
  for (int side = 0; side < 2; ++side) {
    int place = 0, next = side * kSide;
    count[side] = 1 << sum[side];
    for (int k = next; k < next + kSide; ++k) low[k] = high[k] = weight[k] = 0, axis[k] = 0;
    for (int l = 0; l < kMaxSums; ++l) padding[side][l] = l < count[side] ? 0 : kInfinity;
    for (int k = 0; k < dims[side]; ++k) {
      const int i = sides[side][k], m = 1 << bits[i], group = kLevels / m, shift = 4 * i + 4 - bits[i], up = place + side * sum[0];
      for (int l = 0; l < kMaxSums; ++l) interval[side][k][l] = next - side * kSide + (l >> place & (m - 1));
      for (int c = 0; c < entries; ++c) to[c] |= (int32_t)((uint32_t)ranks[c] >> shift & (uint32_t)(m - 1)) << up;
      const float *lows = e.boxes.low + (variant * V + i) * kLevels, *highs = e.boxes.high + (variant * V + i) * kLevels;
      for (int q = 0; q < m; ++q, ++next) {
        float a = lows[q * group], b = highs[q * group];
        for (int r = q * group; r < (q + 1) * group; ++r) a = lows[r] < a ? lows[r] : a, b = highs[r] > b ? highs[r] : b;
        low[next] = a, high[next] = b, weight[next] = w[i], axis[next] = i;
      }
      place += bits[i];
    }
    intervals[side] = next - side * kSide;
  }
}

template <int V> void Boxes<V>::build(const Encoder& e, int variant, const float* weights) {
  if (built && !__builtin_memcmp(w, weights, 4 * V)) return;
  built = true;
  for (int i = 0; i < 16; ++i) w[i] = i < V ? weights[i] : 0, minus_2w[i] = -2 * w[i];
  const int entries = e.i.entries;
  bytes = e.boxes.bytes + (size_t)variant * entries * (V / 4);
  cut(e, variant);
  // Entries by box, each box in whole vectors; the last of a box has code -1 where there are no more.
  const int boxes = count[0] * count[1];
  for (int b = 0; b <= boxes; ++b) first[b] = 0;
  for (int c = 0; c < entries; ++c) ++first[cell[c] + 1];
  for (int b = 0; b < boxes; ++b) {
    first[b + 1] = first[b] + (first[b + 1] + 15) / 16;
    if (first[b] < first[b + 1]) store(code + 16 * (first[b + 1] - 1), seti(-1));
  }
  for (int b = 0; b <= boxes; ++b) first[b] *= 16;  // for a while, the next free place
  for (int c = 0; c < entries; ++c) code[first[cell[c]]++] = c;
  for (int b = boxes; b > 0; --b) first[b] = (first[b - 1] + 15) / 16;
  first[0] = 0;
  for (int v = 0; v < first[boxes]; ++v) {
    int32_t* p = entry + (size_t)v * kStride;
    const I at = load(code + 16 * v);
    F norm = set(0);
    for (int k = 0; k < V / 4; ++k) {
      const I four = gather(bytes + k, scaled_index<V / 4>(at));
      store(p + 16 * k, four);
      for (int i = 0; i < 4; ++i) {
        const F c = to_float(byte_of(four, i)) - set(128);
        norm = fma(set(w[4 * k + i]), c * c, norm);
      }
    }
    store((float*)p + kStride - 16, norm);
    for (int l = 15; l >= 0 && code[16 * v + l] < 0; --l) ((float*)p)[kStride - 16 + l] = 1e38f;
  }
}

// Error less that of zero, for a = -2 w y, of the entry whose bytes are at p (in steps of 16 ints, as in `entry`).
template <int V> template <int STEP> float Boxes<V>::exact(F a, const int32_t* p) const {
  int32_t bytes[4] = {};
  for (int k = 0; k < V / 4; ++k) bytes[k] = p[STEP * k];
  const F c = to_float(load_bytes(bytes)) - set(128);
  return sum(c * fma(load(w), c, a));
}

// For up to 16 queries y = target / |scale|, the entry with the least score in the nearest box and in boxes nearer than `depth` times its
// error. All that is short is done for the 16 at once, one in each lane; the rest has little to mispredict.
template <int V>
void Boxes<V>::near(const float* targets, int stride, const float* scales, int items, float depth, int32_t* codes, int code_stride) const {
  int32_t from[16];
  for (int q = 0; q < 16; ++q) from[q] = (q < items ? q : items - 1) * stride;
  float size[16];
  for (int q = 0; q < 16; ++q) size[q] = scales[q < items ? q : 0] < 0 ? -scales[q < items ? q : 0] : scales[q < items ? q : 0];
  const F none = set(0), s = load(size), inverse = select(less(s, set(1e-36f)), none, set(1) / s);
  F y[V], a[V], rest = none, largest = none;
  for (int i = 0; i < V; ++i) {
    y[i] = min(max(gather(targets + i, load(from)) * inverse, set(-kFarthest)), set(kFarthest));
    a[i] = set(minus_2w[i]) * y[i];
    // What scores lack: w y^2, and the 128 that bytes of entries are more than their values.
    rest = fma(set(w[i]) * y[i], y[i] + set(256), rest), largest = max(largest, max(a[i], none - a[i]));
  }
  const M usable = less(set(1e-30f), largest);
  const F per_step = select(usable, set(32512) / largest, none);
  int32_t upper[V / 4 * 16], lower[V / 4 * 16];
  for (int k = 0; k < V / 4; ++k) {
    I up = seti(0), low = up;
    for (int i = 4 * k + 3; i >= 4 * k; --i) {
      const I q = truncate(fma(a[i], per_step, set(65536.5f))) + seti(-65536);
      up = times256(up) + byte_of(q + seti(128), 1), low = times256(low) + byte_of(q, 0);
    }
    store(upper + 16 * k, up), store(lower + 16 * k, low);
  }
  float steps[16];
  store(steps, select(usable, largest * set(1 / 32512.0f), set(1e-34f)));

  // Distances of the boxes, as sums over the sides.
  float sums[2][16][kMaxSums], least[2][16];
  int32_t place[2][16];
  for (int side = 0; side < 2; ++side) {
    F distance[kSide], lowest_sum = set(kInfinity);
    I where = seti(0);
    for (int k = 0; k < intervals[side]; ++k) {
      const int at = side * kSide + k;
      const F d = max(max(set(low[at]) - y[axis[at]], y[axis[at]] - set(high[at])), none);
      distance[k] = set(weight[at]) * d * d;
    }
    for (int l = 0; l < count[side]; l += 16) {
      F t[16];
      for (int m = 0; m < 16; ++m) {
        t[m] = set(padding[side][l + m]);
        for (int k = 0; k < dims[side]; ++k) t[m] = t[m] + distance[interval[side][k][l + m]];
        keep_lower(t[m], seti(l + m), lowest_sum, where);
      }
      transpose(t);
      for (int q = 0; q < 16; ++q) store(sums[side][q] + l, t[q]);
    }
    store(least[side], lowest_sum), store(place[side], where);
  }

  // The lowest score of each query so far, 16 entries apart, and where it is. In passes over the queries, so that what decides how
  // far a query goes on has long been known when it does.
  F best[16];
  I which[16];
  // Keeps the lower of the scores of vector v in `low` and `at`.
  const auto score = [&](int q, int v, F& low, I& at) {
    keep_lower(score16<V>(entry + (size_t)v * kStride, upper + q, lower + q, 16, seti(0), steps[q]), seti(v), low, at);
  };
  const auto lowest_of_each = [&](I& lane) {
    F t[16], low = set(kInfinity);
    for (int q = 0; q < 16; ++q) t[q] = best[q];
    transpose(t);
    for (int l = 0; l < 16; ++l) keep_lower(t[l], seti(l), low, lane);
    return low;
  };
  const I lane = load(kLane);
  I at = seti(0);
  for (int q = 0; q < 16; ++q) {
    F low = set(kInfinity);
    I where = seti(0);
    const int home = place[1][q] * count[0] + place[0][q];
    for (int v = first[home]; v < first[home + 1]; ++v) score(q, v, low, where);
    best[q] = low, which[q] = where;
  }
  float bounds[16];
  store(bounds, set(depth) * (lowest_of_each(at) + rest));
  for (int q = 0; q < items; ++q) {
    const int home = place[1][q] * count[0] + place[0][q];
    const float bound = bounds[q];
    int32_t boxes[kMaxBoxes + 16], open[kMaxVectors + 16];
    int nearer = 0, opened = 0;
    for (int h = 0; h < count[1]; h += 16)
      for (int rows = below(load(sums[1][q] + h), bound - least[0][q]); rows; rows &= rows - 1) {
        const int row = h + __builtin_ctz(rows);
        for (int l = 0; l < count[0]; l += 16)
          nearer += compress(boxes + nearer, lane + seti(row * count[0] + l), below(load(sums[0][q] + l), bound - sums[1][q][row]));
      }
    for (int i = 0; i < nearer; ++i) {
      const int end = first[boxes[i] + 1], most = boxes[i] == home ? 0 : 16;
      int v = first[boxes[i]];
      do store(open + opened, lane + seti(v)), opened += end - v < most ? end - v : most;
      while ((v += 16) < end);
    }
    // Two chains of comparisons hide their latency.
    open[opened] = opened ? open[opened - 1] : 0;
    F low = best[q], low2 = set(kInfinity);
    I where = which[q], where2 = seti(0);
    for (int i = 0; i < opened; i += 2) score(q, open[i], low, where), score(q, open[i + 1], low2, where2);
    keep_lower(low2, where2, low, where);
    best[q] = low, which[q] = where;
  }
  int32_t lanes[16], vectors[16][16];
  lowest_of_each(at);
  store(lanes, at);
  for (int q = 0; q < 16; ++q) store(vectors[q], which[q]);
  for (int q = 0; q < items; ++q) codes[q * code_stride] = code[16 * vectors[q][lanes[q]] + lanes[q]];
}

// The entry c with the least sum w (y - c)^2 for y = target / scale, exactly. `warm` is an entry thought to be near, or -1. Reads 16
// floats of `target`.
template <int V> int Boxes<V>::nearest(const float* target, float scale, int warm) const {
  const F y = min(max(load(target) * set(scale < 1e-36f ? 0.0f : 1 / scale), set(-kFarthest)), set(kFarthest));
  const F a = load(minus_2w) * y;
  const float zero = sum(load(w) * y * y), largest = -lowest(min(a, set(0) - a));
  // The query in 16 bits, as 256 times a signed byte plus another.
  const float step = largest > 1e-30f ? largest / 32512 : 1e-34f, per_step = largest > 1e-30f ? 32512 / largest : 0.0f;
  const I q = truncate(fma(a, set(per_step), set(65536.5f))) + seti(-65536);
  int32_t upper[4], lower[4];
  store_bytes((uint8_t*)upper, over256(q + seti(128))), store_bytes((uint8_t*)lower, q);
  const I start = seti(-128 * (int32_t)sum(to_float(q)));  // the bytes of entries are 128 more than their values
  const float rounding = step * (66 * V) + 1e-5f * zero;  // of the 16-bit query (codebooks reach 127) and of float sums

  // Distances of the boxes, as sums over the sides.
  float distance[2 * kSide], sums[2][kMaxSums], least[2];
  for (int side = 0; side < 2; ++side) {
    for (int k = side * kSide; k < side * kSide + intervals[side]; k += 16) {
      const F to = lookup16(y, load(axis + k)), d = max(max(load(low + k) - to, to - load(high + k)), set(0));
      store(distance + k, load(weight + k) * d * d);
    }
    F lowest_sum = set(kInfinity);
    for (int l = 0; l < count[side]; l += 16) {
      F total = load(padding[side] + l);
      for (int k = 0; k < dims[side]; ++k) total = total + lookup32(distance + side * kSide, load(interval[side][k] + l));
      store(sums[side] + l, total);
      lowest_sum = min(lowest_sum, total);
    }
    least[side] = lowest(lowest_sum);
  }

  // Candidates are entries whose integer score is below `limit`: the lowest so far plus what both may be off.
  float best = kInfinity, limit = kInfinity, bound = kInfinity;
  int found = 0x7fffffff, candidates = 0;
  float score[kCandidates];
  int candidate[kCandidates];
  const auto lower_to = [&](float most) {
    const float next = most + rounding + 1e-5f * (most < 0 ? -most : most);
    if (next < limit) limit = next, bound = next + zero;
  };
  const auto rank = [&] {
    for (int k = 0; k < candidates; ++k) {
      if (!(score[k] < limit)) continue;
      const int vector = candidate[k] / 16, lane = candidate[k] % 16;
      const float error = exact<16>(a, entry + (size_t)vector * kStride + lane);
      if (error < best || (error == best && code[candidate[k]] < found)) best = error, found = code[candidate[k]];
    }
    candidates = 0;
  };
  const auto open = [&](int box) {
    for (int v = first[box]; v < first[box + 1]; ++v) {
      const int32_t* p = entry + (size_t)v * kStride;
      const F error = score16<V>(p, upper, lower, 1, start, step);
      if (!below(error, limit)) continue;
      lower_to(lowest(error) + rounding);
      float errors[16];
      store(errors, error);
      if (candidates > kCandidates - 16) rank();
      for (int hits = below(error, limit); hits; hits &= hits - 1, ++candidates)
        score[candidates] = errors[__builtin_ctz(hits)], candidate[candidates] = 16 * v + __builtin_ctz(hits);
    }
  };
  int home = -1;
  if (warm >= 0) {
    found = warm, best = exact<1>(a, bytes + (size_t)warm * (V / 4));
    lower_to(best);
  } else {
    int nearest[2] = {0, 0};
    for (int side = 0; side < 2; ++side)
      while (sums[side][nearest[side]] != least[side]) ++nearest[side];
    open(home = nearest[1] * count[0] + nearest[0]);
  }
  for (int h = 0; h < count[1]; h += 16)
    for (int rows = below(load(sums[1] + h), bound - least[0]); rows; rows &= rows - 1) {
      const int row = h + __builtin_ctz(rows);
      const float offset = sums[1][row];
      for (int l = 0; l < count[0]; l += 16)
        for (int hits = below(load(sums[0] + l), bound - offset); hits; hits &= hits - 1) {
          const int column = l + __builtin_ctz(hits), box = row * count[0] + column;
          if (box != home && offset + sums[0][column] < bound) open(box);
        }
    }
  rank();
  return found;
}
