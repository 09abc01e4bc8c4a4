// The search for formats with minima, w = s c - o (see iqtorch/encode/affine.py). Part of encode.inl.

// For fixed codes, the error as a function of scale and offset: sxx - 2 s sxc + 2 o sx + s^2 scc - 2 s o sc + o^2 sw.
struct Form {
  double sxc, sc, scc;
};

struct Fixed {
  double sxx, sx, sw;
};

IQ_FN double form_error(const Fixed& a, const Form& q, double s, double o) {
  return a.sxx + s * (s * q.scc - 2 * q.sxc - 2 * o * q.sc) + o * (2 * a.sx + o * a.sw);
}

IQ_FN void form_optimum(const Fixed& a, const Form& q, bool free_minimum, float& s, float& o) {
  s = divide(a.sw * q.sxc - a.sx * q.sc, a.sw * q.scc - q.sc * q.sc);
  o = divide(s * q.sc - a.sx, a.sw);
  if (!free_minimum && o < 0) s = divide(q.sxc, q.scc), o = 0;
}

IQ_FN Form form_of(const float* x, const float* w, const float* c, int n) {
  F sxc = set(0), sc = set(0), scc = set(0);
  for (int j = 0; j < n; j += 16) {
    const F v = load(c + j), wc = load(w + j) * v;
    sxc = fma(load(x + j), wc, sxc), sc = sc + wc, scc = fma(wc, v, scc);
  }
  return {sum(sxc), sum(sc), sum(scc)};
}

// Least-squares d and dmin of a unit, accumulated group by group.
struct SharedFit {
  double xc = 0, xm = 0, cc = 0, cm = 0, mm = 0;

  void add(const Fixed& a, const Form& q, double multiple, double minimum) {
    xc += multiple * q.sxc, xm += minimum * a.sx, cc += multiple * multiple * q.scc;
    cm += multiple * minimum * q.sc, mm += minimum * minimum * a.sw;
  }

  void solve(float& d, float& dmin) const {
    const double determinant = cc * mm - cm * cm;
    const bool usable = determinant > 1e-6 * cc * mm;
    d = usable ? divide(xc * mm - xm * cm, determinant) : divide(xc, cc);
    dmin = usable ? divide(xc * cm - xm * cc, determinant) : cc == 0 ? divide(-xm, mm) : 0.0f;
  }
};

void Search::run_affine(int64_t u) {
  place(u);
  const Span one{u, 1, 1};
  const bool free_minimum = f.i.free_minimum;
  const int keep = f.i.keep;
  Memory m{moved + count};
  const size_t arrays = (size_t)keep * padded;
  float *sxc = m.take(arrays), *sc = m.take(arrays), *scc = m.take(arrays), *best_s = optimum, *best_o = curvature, *error = gain;
  float *sxx = m.take(padded), *sx = m.take(padded), *sw = m.take(padded);
  int32_t *mins = m.ints(padded), *rank_now = m.ints(padded), *min_now = m.ints(padded);
  int32_t* chosen = m.ints(padded);
  const auto fixed = [&](int g) { return Fixed{sxx[g], sx[g], sw[g]}; };
  const auto form = [&](int k, int g) { return Form{sxc[k * padded + g], sc[k * padded + g], scc[k * padded + g]}; };

  // propose
  for (int g = 0; g < groups; ++g) {
    const float *gx = x + g * n, *gw = w + g * n;
    F xx = set(0), x1 = set(0), w1 = set(0);
    float low = free_minimum ? gx[0] : 0, high = gx[0];
    for (int j = 0; j < n; j += 16) {
      const F wx = load(gw + j) * load(gx + j);
      xx = fma(wx, load(gx + j), xx), x1 = x1 + wx, w1 = w1 + load(gw + j);
    }
    for (int j = 0; j < n; ++j) low = gx[j] < low ? gx[j] : low, high = gx[j] > high ? gx[j] : high;
    sxx[g] = sum(xx), sx[g] = sum(x1), sw[g] = sum(w1), kinds[g] = 0;
    int kept = 0;
    Form best[kMaxKeep];
    double lowest_error[kMaxKeep];
    for (int r = 0; r < f.offset_count; ++r) {
      for (int j = 0; j < n; ++j) moved[j] = gx[j] - low * f.offsets[r];
      for (int t = 0; t < f.trial_count; ++t) {
        const float scale = (high - low) * f.trials[t] / (f.i.entries - 1);
        table(moved, gw, scale, 0, value, nullptr);
        const Form q = form_of(gx, gw, value, n);
        float top_s, top_o;
        form_optimum(fixed(g), q, free_minimum, top_s, top_o);
        const double e = form_error(fixed(g), q, top_s, top_o);
        if (kept == keep && !(e < lowest_error[kept - 1])) continue;
        int at = kept < keep ? kept++ : kept - 1;
        for (; at > 0 && e < lowest_error[at - 1]; --at) best[at] = best[at - 1], lowest_error[at] = lowest_error[at - 1];
        best[at] = q, lowest_error[at] = e;
      }
    }
    for (int k = 0; k < keep; ++k) {
      const Form& q = best[k < kept ? k : 0];
      const int at = k * padded + g;
      sxc[at] = q.sxc, sc[at] = q.sc, scc[at] = q.scc;
      form_optimum(fixed(g), q, free_minimum, best_s[at], best_o[at]);
    }
  }
  for (int g = groups; g < padded; ++g) {
    sxx[g] = sx[g] = sw[g] = 0;
    for (int k = 0; k < keep; ++k) sxc[k * padded + g] = sc[k * padded + g] = scc[k * padded + g] = best_s[k * padded + g] = 0;
  }

  // share
  d = 0;
  float total = kInfinity, dmin = 0, fit_d = 0, fit_dmin = 0, reach_s = 0, reach_o = 0;
  for (int g = 0; g < groups; ++g) {
    reach_s = best_s[g] > reach_s ? best_s[g] : reach_s;
    if (best_o[g] * best_o[g] > reach_o * reach_o) reach_o = best_o[g];
  }
  const auto ranks = [&](int k, int g, int& r, int& mr) {
    const int at = k * padded + g;
    r = rank_of(f.scale, d == 0 ? 0.0f : best_s[at] / d);
    const float o = divide((double)d * f.scale.value[r] * sc[at] - sx[g], sw[g]);
    mr = rank_of(f.minimum, dmin == 0 ? 0.0f : o / dmin);
  };
  const auto consider = [&](float try_d, float try_dmin) {
    try_d = stored.round(try_d), try_dmin = stored.round(try_dmin);
    const F inverse = set(try_d == 0 ? 0.0f : 2 / (try_d * f.scale.factor)), step = set(try_d * f.scale.factor);
    const F inverse_m = set(try_dmin == 0 ? 0.0f : 2 / (try_dmin * f.minimum.factor)), step_m = set(try_dmin * f.minimum.factor);
    F errors = set(0);
    for (int g = 0; g < padded; g += 16) {
      F best = set(kInfinity), over;
      I found = seti(0);
      float t[16];
      for (int i = 0; i < 16; ++i) t[i] = divide(1, sw[g + i]);
      over = load(t);
      for (int k = 0; k < keep; ++k) {
        const int at = k * padded + g;
        const F scale = step * gather(f.scale.rank.value, cell_of(f.scale.rank, load(best_s + at) * inverse));
        const F wanted = (scale * load(sc + at) - load(sx + g)) * over;
        const F o = step_m * gather(f.minimum.rank.value, cell_of(f.minimum.rank, wanted * inverse_m));
        const F cross = scale * load(scc + at) - set(2) * (load(sxc + at) + o * load(sc + at));
        const F e = load(sxx + g) + scale * cross + o * (set(2) * load(sx + g) + o * load(sw + g));
        keep_lower(e, seti(k), best, found);
      }
      errors = errors + best;
      store(chosen + g, found);
    }
    const float e = sum(errors);
    if (!(e < total)) return;
    total = e, d = try_d, dmin = try_dmin;
    SharedFit fit;
    for (int g = 0; g < groups; ++g) {
      int r, mr;
      ranks(chosen[g], g, r, mr);
      fit.add(fixed(g), form(chosen[g], g), f.scale.value[r], f.minimum.value[mr]);
    }
    fit.solve(fit_d, fit_dmin);
  };
  for (int p = 0; p < f.reach_count; ++p)
    for (int q = 0; q < f.reach_minimum_count; ++q)
      consider(reach_s / (f.scale.largest * f.reach[p]), reach_o / (f.minimum.largest * f.reach_minimum[q]));
  for (int i = 0; i < 3; ++i) consider(fit_d, fit_dmin);

  // settle
  const auto try_now = [&] {
    for (int g = 0; g < groups; ++g) {
      const float o = dmin * f.minimum.value[mins[g]];
      s[g] = d * f.scale.value[rank[g]];
      for (int j = 0; j < n; ++j) moved[g * n + j] = x[g * n + j] + o;
    }
    attempt(one, 0, groups, 0, 1, mins);
  };
  const auto refit = [&] {
    SharedFit fit;
    double now = 0, then = 0;
    for (int g = 0; g < groups; ++g) {
      fit.add(fixed(g), form_of(x + g * n, w + g * n, best_value + g * n, n), f.scale.value[best_rank[g]], f.minimum.value[best_min[g]]);
      now += best_error[g];
    }
    float try_d, try_dmin;
    fit.solve(try_d, try_dmin);
    try_d = stored.round(try_d), try_dmin = stored.round(try_dmin);
    for (int g = 0; g < groups; ++g) {
      const float o = try_dmin * f.minimum.value[best_min[g]];
      for (int j = 0; j < n; ++j) moved[j] = x[g * n + j] + o;
      then += s[g] = squared_error(moved, w + g * n, try_d * f.scale.value[best_rank[g]], best_value + g * n, n);
    }
    if (!(then < now)) return;
    d = try_d, dmin = try_dmin;
    for (int g = 0; g < groups; ++g) best_error[g] = s[g];
  };
  for (int g = 0; g < groups; ++g) {
    best_error[g] = kInfinity;
    for (int k = 0; k < keep; ++k) {
      int r, mr;
      ranks(k, g, r, mr);
      error[k * padded + g] = form_error(fixed(g), form(k, g), d * f.scale.value[r], dmin * f.minimum.value[mr]);
    }
  }
  for (int i = 0; i < f.i.shortlist && i < keep; ++i) {
    for (int g = 0; g < groups; ++g) {
      int k = 0;
      for (int j = 1; j < keep; ++j)
        if (error[j * padded + g] < error[k * padded + g]) k = j;
      ranks(k, g, rank[g], mins[g]);
      for (int j = 0; j < keep; ++j) {
        int r, mr;
        ranks(j, g, r, mr);
        if (r == rank[g] && mr == mins[g]) error[j * padded + g] = kInfinity;
      }
    }
    try_now();
  }
  refit();
  for (int round = 0; round < f.i.rounds; ++round) {
    for (int g = 0; g < groups; ++g) rank_now[g] = best_rank[g], min_now[g] = best_min[g];
    for (int ds = -1; ds <= 1; ++ds)
      for (int dm = -1; dm <= 1; ++dm) {
        if ((ds && f.scale.count == 1) || (dm && f.minimum.count == 1)) continue;
        for (int g = 0; g < groups; ++g) {
          const int r = rank_now[g] + ds, mr = min_now[g] + dm;
          rank[g] = r < 0 ? 0 : r >= f.scale.count ? f.scale.count - 1 : r;
          mins[g] = mr < 0 ? 0 : mr >= f.minimum.count ? f.minimum.count - 1 : mr;
        }
        try_now();
      }
    refit();
  }
  write(u);
  data.dmin[u] = stored.bits(dmin);
  for (int g = 0; g < groups; ++g) data.minimum[u * groups + g] = f.minimum.stored[best_min[g]];
}
