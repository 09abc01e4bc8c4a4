// Factor of a symmetric, positive definite matrix A of some hundred columns: A = U D U^T with U upper triangular, blocks of `step` columns
// on its diagonal being the identity, and D of such blocks; and the inverses of larger blocks on the diagonal of U. Sixteen columns at a
// time, from the last to the first. Part of feedback.inl; the version in torch is `unit_factor` in iqtorch/encode/metric.py.
namespace factor {

// Inverse of a positive definite matrix of at most eight columns; false if it is none.
static bool invert(float (*a)[8], int n) {
  for (int p = 0; p < n; ++p) {
    if (!(a[p][p] > 0)) return false;
    const float scale = 1 / a[p][p];
    a[p][p] = 1;
    for (int j = 0; j < n; ++j) a[p][j] *= scale;
    for (int i = 0; i < n; ++i) {
      if (i == p) continue;
      const float f = a[i][p];
      a[i][p] = 0;
      for (int j = 0; j < n; ++j) a[i][j] -= f * a[p][j];
    }
  }
  return true;
}

// Factors the sixteen columns at `a`, of which it reads the upper part and leaves U, and stores D. Any row of these columns above them
// becomes U D by a product with `to_scaled`, and U by one with `to_unit` [16][16].
static bool diagonal(float* a, int64_t stride, int step, float* blocks, float* to_scaled, float* to_unit) {
  float over[L][8];  // D^-1, a row per column
  for (int j = L - step; j >= 0; j -= step) {
    float d[8][8];
    for (int p = 0; p < step; ++p) for (int q = 0; q < step; ++q) d[p][q] = a[(j + (p < q ? p : q)) * stride + j + (p < q ? q : p)];
    for (int p = 0; p < step; ++p) for (int q = 0; q < step; ++q) blocks[(j + p) * step + q] = d[p][q];
    if (!invert(d, step)) return false;
    for (int p = 0; p < step; ++p) {
      for (int q = 0; q < step; ++q) over[j + p][q] = d[p][q], a[(j + p) * stride + j + q] = p == q;
    }
    float scaled[L][8];
    for (int i = 0; i < j; ++i) {
      float* row = a + i * stride + j;
      for (int q = 0; q < step; ++q) scaled[i][q] = row[q], row[q] = 0;
      for (int p = 0; p < step; ++p) for (int q = 0; q < step; ++q) row[q] += scaled[i][p] * d[p][q];
    }
    for (int i = 0; i < j; ++i) {
      for (int k = i; k < j; ++k) for (int q = 0; q < step; ++q) a[i * stride + k] -= scaled[i][q] * a[k * stride + j + q];
    }
  }
  for (int i = 0; i < L * L; ++i) to_scaled[i] = to_unit[i] = 0;
  for (int i = L - 1; i >= 0; --i) {  // row i of the inverse of U is column i of `to_scaled`
    to_scaled[i * L + i] = 1;
    for (int k = i + 1; k < L; ++k) for (int j = k; j < L; ++j) to_scaled[j * L + i] -= a[i * stride + k] * to_scaled[j * L + k];
  }
  for (int k = 0; k < L; ++k) {
    for (int j = 0; j < L; j += step) {
      for (int p = 0; p < step; ++p) for (int q = 0; q < step; ++q) to_unit[k * L + j + q] += to_scaled[k * L + j + p] * over[j + p][q];
    }
  }
  return true;
}

// ROWS rows of a product: sums[r] + sum over k of left[r][k] times right[k].
template <int ROWS> IQ_FN void add_product(F* sums, const float* left, int64_t stride, const float* right, int64_t right_stride, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const F v = load(right + k * right_stride);
    for (int r = 0; r < ROWS; ++r) sums[r] = fma(set(left[r * stride + k]), v, sums[r]);
  }
}

static bool run(const FactorData& f, float* scratch) {
  constexpr int kRows = 8;
  const int64_t n = f.columns;
  float *minus = scratch, *turned = minus + n * n;  // -U D, and sixteen rows of U as columns
  float to_scaled[L * L], to_unit[L * L];
  for (int64_t c = n - L; c >= 0; c -= L) {
    const int64_t after = n - c - L;
    for (int64_t k = 0; k < after; ++k) for (int i = 0; i < L; ++i) turned[k * L + i] = f.form[(c + i) * f.stride + c + L + k];
    for (int64_t i = 0; i < c + L; i += kRows) {
      F t[kRows];
      for (int r = 0; r < kRows; ++r) t[r] = load(f.form + (i + r) * f.stride + c);
      add_product<kRows>(t, minus + i * n + c + L, n, turned, L, after);
      for (int r = 0; r < kRows; ++r) store(f.form + (i + r) * f.stride + c, t[r]);
    }
    if (!diagonal(f.form + c * f.stride + c, f.stride, (int)f.step, f.blocks + c * f.step, to_scaled, to_unit)) return false;
    for (int64_t i = 0; i < c; i += kRows) {
      F scaled[kRows], unit[kRows];
      for (int r = 0; r < kRows; ++r) scaled[r] = unit[r] = set(0);
      add_product<kRows>(scaled, f.form + i * f.stride + c, f.stride, to_scaled, L, L);
      add_product<kRows>(unit, f.form + i * f.stride + c, f.stride, to_unit, L, L);
      for (int r = 0; r < kRows; ++r) store(minus + (i + r) * n + c, set(0) - scaled[r]), store(f.form + (i + r) * f.stride + c, unit[r]);
    }
  }
  // Row i of an inverse: that of the identity less the rows below, times row i of U.
  constexpr int kPieces = 4;
  for (int64_t i = n - 1; i >= 0; --i) {
    const int64_t first = i / f.block * f.block, end = n - first < f.block ? n - first : f.block, own = i - first;
    float *inverse = f.inverse + first * f.block, *row = inverse + own * f.block, *u = turned;
    for (int64_t k = 0; k < end; ++k) row[k] = k == own, u[k] = k > own ? -f.form[i * f.stride + first + k] : 0;
    for (int64_t c = own / L * L; c < end; c += kPieces * L) {
      const int pieces = (int)((end - c) / L < kPieces ? (end - c) / L : kPieces);
      F t[kPieces];
      for (int p = 0; p < pieces; ++p) t[p] = load(row + c + p * L);
      for (int64_t k = own + 1; k < c + pieces * L; ++k) {
        for (int p = 0; p < pieces; ++p) t[p] = fma(set(u[k]), load(inverse + k * f.block + c + p * L), t[p]);
      }
      for (int p = 0; p < pieces; ++p) store(row + c + p * L, t[p]);
    }
  }
  return true;
}

}  // namespace factor
