// Search of large codebooks of vectors. Entries lie in tiles of sixteen, `[vec, 16]`, which are compared with one row at a time by the whole form
// of the step; which tiles are worth it is found beforehand, for vectors of eight by products of bytes, for vectors of four by where they lie.
// Part of feedback_vectors.inl.

// The best entry so far of a row, in each lane among the entries at that place of a tile.
struct Nearest {
  F least = set(__builtin_inff());
  I tile = I{};
};

// Score = s * square + sum u value; `u` is a lane of F[V].
template <int V> IQ_FN void compare_tile(Nearest& a, const float* tiles, const float* square, int32_t t, float s, const float* u) {
  F now = s * load<F>(square + t * L, L);
  for (int i = 0; i < V; ++i) now = fma(load<F>(tiles + (t * V + i) * L, L), set(u[i * L]), now);
  const I better = now < a.least;
  a.least = better ? now : a.least;
  a.tile = better ? seti(t) : a.tile;
}

IQ_FN int32_t best_entry(const Nearest& a) {
  int lane = 0;
#if defined(__AVX512F__)
  const float lowest = _mm512_reduce_min_ps((__m512)a.least);
  const uint32_t where = _mm512_cmp_ps_mask((__m512)a.least, _mm512_set1_ps(lowest), _CMP_EQ_OQ);
  if (where) lane = __builtin_ctz(where);
#else
  for (int i = 1; i < L; ++i) lane = a.least[i] < a.least[lane] ? i : lane;
#endif
  return a.tile[lane] * L + lane;
}

// -- vectors of eight --------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)
// Rows as `dot` takes them: u in 127 steps of its largest, the same for what the entries' squares are multiplied by.
struct Bytes {
  I part[2];
  F square;
};

// `largest`: of all squares, in one of the lanes.
IQ_FN Bytes to_bytes(F s, const F* u, F largest) {
  F most = set(1e-30f);
  for (int i = 0; i < 8; ++i) most = magnitude(u[i]) > most ? magnitude(u[i]) : most;
  const F room = 1e9f / (s * _mm512_reduce_max_ps((__m512)largest) + 1e-30f), steps = 127.0f / most, per = steps < room ? steps : room;  // so that sums stay below 2^31
  Bytes r{{I{}, I{}}, s * per};
  for (int i = 0; i < 8; ++i) r.part[i / 4] |= ((I)_mm512_cvtps_epi32((__m512)(u[i] * per)) & 255) << (8 * (i % 4));
  return r;
}

// The tile of [first, last) with the lowest score of an entry, for each of C scales and each lane.
template <int C>
IQ_FN void best_tiles(const uint8_t* bytes, const float* square, int64_t first, int64_t last, const Bytes* q, I* best) {
  I least[C];
  for (int c = 0; c < C; ++c) least[c] = seti(0x7fffffff), best[c] = seti((int32_t)first);
  for (int64_t tile = first; tile < last; ++tile) {
    I now[C];
    for (int k = 0; k < L; ++k) {
      int32_t part[2];
      __builtin_memcpy(part, bytes + (tile * L + k) * 8, 8);
      const __m512i low = _mm512_set1_epi32(part[0]), high = _mm512_set1_epi32(part[1]);
      for (int c = 0; c < C; ++c) {
        __m512i sum = _mm512_cvtps_epi32((__m512)(q[c].square * square[tile * L + k]));
        sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, low, (__m512i)q[c].part[0]), high, (__m512i)q[c].part[1]);
        now[c] = k ? (I)_mm512_min_epi32((__m512i)now[c], sum) : (I)sum;
      }
    }
    for (int c = 0; c < C; ++c) {
      const I better = now[c] < least[c];
      least[c] = better ? now[c] : least[c];
      best[c] = better ? seti((int32_t)tile) : best[c];
    }
  }
}

// The best of the entries of [first, last): those of the best tile of each of `slices` by bytes are compared.
template <int C>
IQ_FN void best_by_bytes(const FeedbackData& b, int kind, const float* square, int64_t first, int64_t last, int slices, const F* s, const F (*u)[8], I* best) {
  const uint8_t* bytes = b.bytes + kind * b.entries * 8;
  const float* tiles = b.tiles + kind * b.entries * 8;
  const int64_t width = (last - first) / L / slices;
  F largest{};
  for (int64_t e = first; e < last; e += L) largest = -lower(-load<F>(square + e, L), -largest);
  Bytes q[C];
  I tile[C], found[C][16];
  for (int c = 0; c < C; ++c) q[c] = to_bytes(s[c], u[c], largest);
  for (int i = 0; i < slices; ++i) {
    best_tiles<C>(bytes, square, first / L + i * width, first / L + (i + 1) * width, q, tile);
    for (int c = 0; c < C; ++c) found[c][i] = tile[c];
  }
  for (int c = 0; c < C; ++c)
    for (int lane = 0; lane < L; ++lane) {
      Nearest nearest;
      for (int i = 0; i < slices; ++i) compare_tile<8>(nearest, tiles, square, found[c][i][lane], s[c][lane], (const float*)u[c] + lane);
      best[c][lane] = best_entry(nearest);
    }
}
#endif

// -- vectors of four ---------------------------------------------------------------------------------------------

// The best of the entries whose first two values are about those of the target: of five slabs and five cells of each.
template <int C> IQ_FN void best_of_cells(const FeedbackData& b, int kind, const float* square, const F* s, const F (*t)[4], const F (*u)[4], I* best) {
  constexpr int kAround = 2;
  const int64_t width = b.entries / (kCells * kCells * L);  // tiles of a cell
  const float *cuts = b.cuts + kind * (kCells + 1) * kCells, *tiles = b.tiles + kind * b.entries * 4;
  const auto place = [](const float* cuts, float x) {
    int n = 0;
    for (int i = 0; i < kCells - 1; ++i) n += x > cuts[i];
    return n;
  };
  for (int c = 0; c < C; ++c)
    for (int lane = 0; lane < L; ++lane) {
      const float size = s[c][lane], over = size != 0 ? 1 / size : 0;
      const int slab = place(cuts, t[c][0][lane] * over);
      Nearest nearest;
      for (int i = slab < kAround ? 0 : slab - kAround; i <= slab + kAround && i < kCells; ++i) {
        const int cell = place(cuts + (i + 1) * kCells, t[c][1][lane] * over);
        const int64_t from = cell < kAround ? 0 : cell - kAround, to = cell + kAround + 1 < kCells ? cell + kAround + 1 : kCells;
        for (int64_t k = (i * kCells + from) * width; k < (i * kCells + to) * width; ++k)
          compare_tile<4>(nearest, tiles, square, (int32_t)k, size < 0 ? -size : size, (const float*)u[c] + lane);
      }
      best[c][lane] = best_entry(nearest);
    }
}
