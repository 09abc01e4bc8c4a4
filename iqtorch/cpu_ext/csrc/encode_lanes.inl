// The search for codebooks of single values, sixteen units at a time, one in each lane: nothing is summed across lanes, and the nearest
// codes come from registers. Formats with minima, w = s (c + shift) - o, are the same search in two dimensions. Part of encode.inl.
//
// With its codes c fixed, the error of a group near a scale s and an offset o is a quadratic form, from the errors e = x + o - s c:
//   E - 2 ds B + 2 do S1 + ds^2 CC - 2 ds do C1 + do^2 W,   E = sum w e^2, B = sum w e c, S1 = sum w e, CC = sum w c^2, C1 = sum w c, W = sum w.

// -- the search --------------------------------------------------------------------------------------------------------

// A form at its lowest point (s, o). Without minima the error is relative to that of zeros.
struct Form { F error, s, o, cc, c1, shift; };
constexpr int kFormFloats = 6 * kLanes;

// Errors of a group for the scale, offset and variant that were tried, as sums (see above).
struct Sums { F e, b, s1, cc, c1; };

// What is chosen for a group: ranks of scale and minimum (as floats), shift of the variant, and its sums.
struct Choice { F rank, low_rank, shift; Sums sums; F weight; };
constexpr int kChoiceFloats = 9 * kLanes;

template <class T> IQ_FN void put(float* p, const T& a) {
  for (size_t i = 0; i < sizeof(T) / sizeof(F); ++i) store(p + kLanes * i, ((const F*)&a)[i]);
}
template <class T> IQ_FN T get(const float* p) {
  T a;
  for (size_t i = 0; i < sizeof(T) / sizeof(F); ++i) ((F*)&a)[i] = load(p + kLanes * i);
  return a;
}

IQ_FN F absolute(F a) { return max(a, set(0) - a); }
IQ_FN F quotient(F a, F b) { return select(equal(b, set(0)), set(0), a / b); }
IQ_FN F inverse_of(F s) { return select(less(absolute(s), set(1e-36f)), set(0), set(1) / s); }

// The stored scales are integers in equal steps.
struct Ladder {
  F first, step, per_step, last;
  explicit Ladder(const ScaleGrid& g)
      : first(set(g.value[0])), step(set(g.count > 1 ? g.value[1] - g.value[0] : 1)),
        per_step(set(g.count > 1 ? 1 / (g.value[1] - g.value[0]) : 0)), last(set((float)(g.count - 1))) {}
  IQ_INLINE F clamp(F rank) const { return min(max(rank, set(0)), last); }
  IQ_INLINE F rank(F ratio) const {
    const F round = set(12582912.0f);
    return (clamp((ratio - first) * per_step) + round) - round;
  }
  IQ_INLINE F value(F rank) const { return fma(rank, step, first); }
};

template <class Near, bool AFFINE> struct Lanes {
  const Encoder& f;
  const EncodeData& data;
  const Near near;
  const Ladder scales, minima;
  const int n, groups, keep;
  int64_t first_unit, loaded = -1;  // the group that x and w hold
  Stored stored[kLanes];
  F up, down;  // of `stored`
  alignas(64) float x[kMaxSingles * kLanes];  // of a group, [n][lanes]
  alignas(64) float w[kMaxSingles * kLanes];
  float *forms, *choices;                              // [groups][keep] and [groups]
  F d, dmin;

  Lanes(const Encoder& f, const EncodeData& data, Memory m)
      : f(f), data(data), near(f.values), scales(f.scale), minima(f.minimum), n(f.i.group), groups(f.i.groups), keep(f.i.keep) {
    forms = m.take((size_t)groups * keep * kFormFloats), choices = m.take((size_t)groups * kChoiceFloats);
  }

  float* form(int g, int k) const { return forms + ((size_t)g * keep + k) * kFormFloats; }
  float* choice(int g) const { return choices + (size_t)g * kChoiceFloats; }
  int64_t unit(int lane) const {
    const int64_t u = first_unit + lane;
    return u < data.units ? u : data.units - 1;
  }

  // As `Stored::round`; powers of two below 2^-126, subnormal, need not be the nearest.
  F rounded(F v) const {
    v = v * up;
    if (f.i.d_kind == kHalf) {
      const F bound = set(65504), near = min(max(v, set(0) - bound), bound);
      const F coarse = max(power_of(near), set(1.0f / 16384)) * set(12288);  // sums with it keep ten bits
      v = (near + coarse) - coarse;
    } else if (f.i.d_kind == kExponent) {
      const F low = power_of(max(v, set(0)));
      v = min(max(select(less(low * set(1.41421354f), v), low + low, low), set(power_of_two(-128))), set(power_of_two(126)));
    }
    return v * down;
  }

  void load_group(int g) {
    if (loaded == first_unit * groups + g) return;
    loaded = first_unit * groups + g;
    const size_t count = (size_t)n * groups, at = (size_t)g * n;
    const float *rows[kLanes], *weights[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t u = unit(l);
      rows[l] = data.x + u * count + at, weights[l] = data.w + u % data.weight_rows * count + at;
    }
    for (int j = 0; j < n; j += kLanes) {
      F t[kLanes];
      for (int l = 0; l < kLanes; ++l) t[l] = load(rows[l] + j);
      transpose(t);
      for (int l = 0; l < kLanes; ++l) store(x + (j + l) * kLanes, t[l]);
      if (data.weight_rows == 1) {
        for (int l = 0; l < kLanes; ++l) store(w + (j + l) * kLanes, set(weights[0][j + l]));
        continue;
      }
      for (int l = 0; l < kLanes; ++l) t[l] = load(weights[l] + j);
      transpose(t);
      for (int l = 0; l < kLanes; ++l) store(w + (j + l) * kLanes, t[l]);
    }
  }

  IQ_INLINE Sums sums(F s, F o, F shift) const {
    const F inverse = inverse_of(s), none = set(0), move = AFFINE ? o * inverse : none - shift;
    Sums a{none, none, none, none, none};
    if (!AFFINE && f.i.code_parity) {
      F value[kMaxSingles];
      even_values(s, shift, value, nullptr);
      for (int j = 0; j < n; ++j) {
        const F v = load(w + j * kLanes), e = load(x + j * kLanes) - s * value[j], we = v * e;
        a.e = fma(we, e, a.e), a.b = fma(we, value[j], a.b), a.cc = fma(v * value[j], value[j], a.cc);
      }
      return a;
    }
    for (int j = 0; j < n; ++j) {
      const F xj = load(x + j * kLanes), v = load(w + j * kLanes);
      F c = near(fma(xj, inverse, move));
      if (!AFFINE) c = c + shift;
      const F e = (AFFINE ? xj + o : xj) - s * c, we = v * e, vc = v * c;
      a.e = fma(we, e, a.e), a.b = fma(we, c, a.b), a.cc = fma(vc, c, a.cc);
      if (AFFINE) a.s1 = a.s1 + we, a.c1 = a.c1 + vc;
    }
    return a;
  }

  // Nearest values (and codes) such that each word of codes has an even count of ones: the code changes that costs least to change.
  void even_values(F s, F shift, F* value, I* code) const {
    const F inverse = inverse_of(s), none = set(0);
    const int words = f.i.code_parity;
    for (int j = 0; j < n; j += words) {
      I ones = seti(0), cheapest = seti(0), cheapest_code = seti(0);
      F cost = set(kInfinity), cheapest_value = none;
      for (int k = 0; k < words; ++k) {
        const int at = f.order[j + k];
        const F xj = load(x + at * kLanes), y = fma(xj, inverse, none - shift), c = near(y) + shift;
        const I own = code_of(f.values, c - shift);
        const I other = gather(f.other, cell_of(f.values.cells, y + y));
        const F other_value = gather(f.book, other) + shift, a = xj - s * other_value, b = xj - s * c;
        const F change = load(w + at * kLanes) * (a * a - b * b);
        const M cheaper = less(change, cost);
        cost = select(cheaper, change, cost), cheapest = select(cheaper, seti(k), cheapest);
        cheapest_value = select(cheaper, other_value, cheapest_value), cheapest_code = select(cheaper, other, cheapest_code);
        ones = ones + gather(f.odd, own), value[at] = c;
        if (code) code[at] = own;
      }
      const M odd_word = odd(ones);
      for (int k = 0; k < words; ++k) {
        const int at = f.order[j + k];
        const M change = odd_word & equal(cheapest, seti(k));
        value[at] = select(change, cheapest_value, value[at]);
        if (code) code[at] = select(change, cheapest_code, code[at]);
      }
    }
  }

  // Keeps a form if it is among the lowest.
  void insert(int g, Form now) const {
    for (int k = 0; k < keep; ++k) {
      float* p = form(g, k);
      Form held = get<Form>(p);
      const M lower = less(now.error, held.error);
      if (!any(lower)) continue;
      const auto swap = [&](F& a, F& b) {
        const F t = select(lower, a, b);
        a = select(lower, b, a), b = t;
      };
      swap(now.error, held.error), swap(now.s, held.s), swap(now.cc, held.cc);
      if (AFFINE) swap(now.o, held.o), swap(now.c1, held.c1);
      else swap(now.shift, held.shift);
      put(p, held);
    }
  }

  // The best forms of a group.
  void propose(int g) {
    load_group(g);
    const F none = set(0);
    for (int k = 0; k < keep; ++k) put(form(g, k), Form{set(kInfinity), none, none, none, none, none});
    if (AFFINE) return propose_affine(g);
    F most = none;
    for (int j = 0; j < n; ++j) most = max(most, absolute(load(x + j * kLanes)));
    most = most / set(f.reference);
    const bool powers = f.i.d_kind == kExponent;  // of two: the trial scales are all there are
    if (powers) most = rounded(most);
    for (int pass = 0; pass < f.i.variants * (f.i.two_signs ? 2 : 1); ++pass) {
      const int variant = f.i.two_signs ? pass / 2 : pass;
      const F unit = f.i.two_signs && pass % 2 ? none - most : most, shift = set(f.values.shift[variant]), minus = none - shift;
      F last = none, last_cc = set(-1);
      const auto last_is_best = [&] { return equal(load(form(g, 0) + kLanes), last); };
      const auto found = [&](F xc, F cc, F trial, bool sure) {
        const F s = powers ? trial : quotient(xc, cc);
        const M again = equal(s, last) & equal(cc, last_cc);  // the same codes as at the last trial scale
        F error = select(again, set(kInfinity), powers ? s * (s * cc - set(2) * xc) : none - s * xc);
        if (!sure) error = select(last_is_best(), error, set(kInfinity));
        last = s, last_cc = cc;
        insert(g, {error, s, none, cc, none, shift});
      };
      if (f.i.code_parity) {
        for (int t = 0; t < f.trial_count; ++t) {
          F c[kMaxSingles], xc = none, cc = none;
          even_values(unit * set(f.trials[t]), shift, c, nullptr);
          for (int j = 0; j < n; ++j) {
            const F vc = load(w + j * kLanes) * c[j];
            xc = fma(load(x + j * kLanes), vc, xc), cc = fma(vc, c[j], cc);
          }
          found(xc, cc, unit * set(f.trials[t]), true);
        }
        continue;
      }
      for (int t = 0; t < f.trial_count; t += 2) {  // two at a time hide the latency of the sums
        if (t >= f.i.sure_trials && !any(last_is_best())) break;
        const bool both = t + 1 < f.trial_count;
        const F inverse = inverse_of(unit * set(f.trials[t])), inverse2 = inverse_of(unit * set(f.trials[both ? t + 1 : t]));
        F xc = none, cc = none, xc2 = none, cc2 = none;
        for (int j = 0; j < n; ++j) {
          const F xj = load(x + j * kLanes), v = load(w + j * kLanes);
          const F c = near(fma(xj, inverse, minus)) + shift, c2 = near(fma(xj, inverse2, minus)) + shift;
          const F vc = v * c, vc2 = v * c2;
          xc = fma(xj, vc, xc), cc = fma(vc, c, cc), xc2 = fma(xj, vc2, xc2), cc2 = fma(vc2, c2, cc2);
        }
        found(xc, cc, unit * set(f.trials[t]), t < f.i.sure_trials);
        if (both) found(xc2, cc2, unit * set(f.trials[t + 1]), t + 1 < f.i.sure_trials);
      }
    }
    fill(g);
  }

  void propose_affine(int g) {
    const F none = set(0);
    F low = f.i.free_minimum ? load(x) : none, high = load(x), weight = none;
    for (int j = 0; j < n; ++j) low = min(low, load(x + j * kLanes)), high = max(high, load(x + j * kLanes)), weight = weight + load(w + j * kLanes);
    Choice c{};
    c.weight = weight;
    put(choice(g), c);
    const F unit = (high - low) / set((float)(f.i.entries - 1));
    F last = none, last_cc = set(-1);
    for (int r = 0; r < f.offset_count; ++r)
      for (int t = 0; t < f.trial_count; ++t) {
        const F s = unit * set(f.trials[t]), o = none - low * set(f.offsets[r]);
        const Form now = lowest_point(sums(s, o, none), s, o, weight);
        const M again = equal(now.s, last) & equal(now.cc, last_cc);
        last = now.s, last_cc = now.cc;
        Form kept = now;
        kept.error = select(again, set(kInfinity), now.error);
        insert(g, kept);
      }
    fill(g);
  }

  Form lowest_point(const Sums& a, F s, F o, F weight) const {
    const F none = set(0), determinant = a.cc * weight - a.c1 * a.c1;
    const M usable = less(set(1e-5f) * (a.cc * weight), determinant);
    F ds = select(usable, (a.b * weight - a.s1 * a.c1) / determinant, none);
    F down = quotient(ds * a.c1 - a.s1, weight);
    F error = a.e + down * a.s1 - ds * a.b;
    if (!f.i.free_minimum) {
      const M below = less(o + down, none);
      const F ds0 = quotient(a.b - o * a.c1, a.cc);
      const F error0 = a.e + ds0 * (ds0 * a.cc - set(2) * (a.b - o * a.c1)) + o * (o * weight - set(2) * a.s1);
      ds = select(below, ds0, ds), down = select(below, none - o, down), error = select(below, error0, error);
    }
    return {max(error, none), s + ds, o + down, a.cc, a.c1, none};
  }

  // Places that no form was found for repeat the best.
  void fill(int g) const {
    const Form best = get<Form>(form(g, 0));
    for (int k = 1; k < keep; ++k) {
      Form held = get<Form>(form(g, k));
      const M empty = equal(held.error, set(kInfinity));
      if (!any(empty)) continue;
      for (size_t i = 0; i < sizeof(Form) / sizeof(F); ++i) ((F*)&held)[i] = select(empty, ((const F*)&best)[i], ((F*)&held)[i]);
      put(form(g, k), held);
    }
  }

  // The `d` whose multiples serve the parabolas of all groups best.
  void share() {
    const F none = set(0);
    F best = set(kInfinity), fit = none;
    d = dmin = none;
    const auto consider = [&](F now) {
      now = rounded(now);
      const F inverse = inverse_of(now);
      F total = none, a = none, b = none;
      for (int g = 0; g < groups; ++g) {
        F lowest = set(kInfinity), multiple = none, s = none, cc = none;
        for (int k = 0; k < keep; ++k) {
          const float* p = form(g, k);
          const F top = load(p + kLanes), bend = load(p + 3 * kLanes), m = scales.value(scales.rank(top * inverse)), e = fma(now, m, none - top);
          const F error = fma(e * e, bend, load(p));
          const M lower = less(error, lowest);
          lowest = select(lower, error, lowest), multiple = select(lower, m, multiple), s = select(lower, top, s), cc = select(lower, bend, cc);
        }
        const F wm = cc * multiple;
        total = total + lowest, a = fma(wm, s, a), b = fma(wm, multiple, b);
      }
      const M better = less(total, best);
      best = select(better, total, best), d = select(better, now, d), fit = select(better, quotient(a, b), fit);
      return any(better);
    };
    if (f.scale.count == 1) {
      for (int k = 0; k < keep; ++k)
        for (int r = 0; r < f.reach_count; ++r) consider(load(form(0, k) + kLanes) * set(f.reach[r] / f.scale.largest));
    } else {
      F reach = none;
      for (int g = 0; g < groups; ++g) {
        const F s = load(form(g, 0) + kLanes);
        reach = select(less(absolute(reach), absolute(s)), s, reach);
      }
      for (int r = 0; r < f.reach_count; ++r) {
        const F now = reach / set(f.scale.largest * f.reach[r]);
        consider(now), consider(none - now);
      }
    }
    for (int i = 0; i < 3 && consider(fit); ++i) {}
  }

  // Least-squares d and dmin from sums over groups of B M, S1 N, CC M^2, C1 M N, W N^2, where s = d M and o = dmin N.
  static void solve(F b, F s, F cc, F cm, F mm, F& d, F& dmin) {
    const F none = set(0), determinant = cc * mm - cm * cm;
    const M usable = less(set(1e-5f) * (cc * mm), determinant);
    const F both = quotient(b * mm - cm * s, determinant);
    d = select(usable, both, quotient(b, cc));
    dmin = select(usable, quotient(both * cm - s, mm), select(equal(cc, none), quotient(none - s, mm), none));
  }

  struct Ranks { F scale, minimum, s, o, error; };

  Ranks ranks(const Form& q, F weight, F d, F inverse, F dmin, F inverse_min) const {
    Ranks r;
    r.scale = scales.rank(q.s * inverse), r.s = d * scales.value(r.scale);
    const F ds = r.s - q.s, wanted = q.o + quotient(ds * q.c1, weight);
    r.minimum = minima.rank(wanted * inverse_min), r.o = dmin * minima.value(r.minimum);
    const F down = r.o - q.o;
    r.error = q.error + ds * (ds * q.cc - set(2) * (down * q.c1)) + down * down * weight;
    return r;
  }

  void share_affine() {
    const F none = set(0);
    F best = set(kInfinity), fit = none, fit_min = none, reach = none, reach_min = none;
    d = dmin = none;
    for (int g = 0; g < groups; ++g) {
      const Form q = get<Form>(form(g, 0));
      reach = max(reach, q.s), reach_min = select(less(absolute(reach_min), absolute(q.o)), q.o, reach_min);
    }
    const auto consider = [&](F now, F now_min) {
      now = rounded(now), now_min = rounded(now_min);
      const F inverse = inverse_of(now), inverse_min = inverse_of(now_min);
      F total = none, b = none, s = none, cc = none, cm = none, mm = none;
      for (int g = 0; g < groups; ++g) {
        const F weight = load(choice(g) + 8 * kLanes);
        Form chosen{};
        Ranks at{none, none, none, none, set(kInfinity)};
        for (int k = 0; k < keep; ++k) {
          const Form q = get<Form>(form(g, k));
          const Ranks r = ranks(q, weight, now, inverse, now_min, inverse_min);
          const M lower = less(r.error, at.error);
          for (int i = 1; i < 5; ++i) ((F*)&chosen)[i] = select(lower, ((const F*)&q)[i], ((F*)&chosen)[i]);
          for (int i = 0; i < 5; ++i) ((F*)&at)[i] = select(lower, ((const F*)&r)[i], ((F*)&at)[i]);
        }
        const F m = scales.value(at.scale), l = minima.value(at.minimum), mc = m * chosen.cc, lc = l * chosen.c1;
        total = total + at.error;
        b = b + m * (chosen.cc * chosen.s - chosen.c1 * chosen.o), s = s + l * (chosen.c1 * chosen.s - weight * chosen.o);
        cc = fma(mc, m, cc), cm = fma(lc, m, cm), mm = fma(weight * l, l, mm);
      }
      const M better = less(total, best);
      best = select(better, total, best), d = select(better, now, d), dmin = select(better, now_min, dmin);
      F next, next_min;
      solve(b, s, cc, cm, mm, next, next_min);
      fit = select(better, next, fit), fit_min = select(better, next_min, fit_min);
      return any(better);
    };
    for (int p = 0; p < f.reach_count; ++p)
      for (int q = 0; q < f.reach_minimum_count; ++q)
        consider(reach / set(f.scale.largest * f.reach[p]), reach_min / set(f.minimum.largest * f.reach_minimum[q]));
    for (int i = 0; i < 3 && consider(fit, fit_min); ++i) {}
  }

  // Tries ranks and a variant on the weights themselves.
  void attempt(Choice& c, F rank, F low_rank, F shift) const {
    const F s = d * scales.value(rank), o = AFFINE ? dmin * minima.value(low_rank) : set(0);
    const Sums a = sums(s, o, shift);
    const M lower = less(a.e, c.sums.e);
    c.rank = select(lower, rank, c.rank), c.low_rank = select(lower, low_rank, c.low_rank), c.shift = select(lower, shift, c.shift);
    for (int i = 0; i < 5; ++i) ((F*)&c.sums)[i] = select(lower, ((const F*)&a)[i], ((F*)&c.sums)[i]);
  }

  // The first codes, at the `d` of `share`: those of the scales and variants with the lowest forms.
  void shortlist(int g) {
    load_group(g);
    const F inverse = inverse_of(d), inverse_min = inverse_of(dmin), none = set(0);
    Choice c = get<Choice>(choice(g));
    c.rank = c.low_rank = c.shift = none, c.sums = {set(kInfinity), none, none, none, none};
    F error[kMaxKeep], rank[kMaxKeep], low_rank[kMaxKeep], shift[kMaxKeep];
    for (int k = 0; k < keep; ++k) {
      const Form q = get<Form>(form(g, k));
      shift[k] = q.shift, low_rank[k] = none;
      if (AFFINE) {
        const Ranks r = ranks(q, c.weight, d, inverse, dmin, inverse_min);
        error[k] = r.error, rank[k] = r.scale, low_rank[k] = r.minimum;
      } else {
        rank[k] = scales.rank(q.s * inverse);
        const F e = fma(d, scales.value(rank[k]), none - q.s);
        error[k] = fma(e * e, q.cc, q.error);
      }
    }
    const bool one = f.scale.count == 1 && (!AFFINE || f.minimum.count == 1) && f.i.variants == 1;  // pair to try
    for (int t = 0; t < (one ? 1 : f.i.shortlist) && t < keep; ++t) {
      F lowest = set(kInfinity), r = none, lr = none, v = none;
      for (int k = 0; k < keep; ++k) {
        const M lower = less(error[k], lowest);
        lowest = select(lower, error[k], lowest), r = select(lower, rank[k], r), lr = select(lower, low_rank[k], lr), v = select(lower, shift[k], v);
      }
      for (int k = 0; k < keep; ++k) {
        const M same = equal(r, rank[k]) & equal(v + lr, shift[k] + low_rank[k]);  // one of the two is always 0
        error[k] = select(same, set(kInfinity), error[k]);
      }
      attempt(c, r, lr, v);
    }
    put(choice(g), c);
  }

  // The chosen scales again (`d` has changed), those beside them, and the other variant.
  void neighbours(int g) {
    load_group(g);
    Choice c = get<Choice>(choice(g));
    const F rank = c.rank, low_rank = c.low_rank, shift = c.shift;
    c.sums.e = set(kInfinity);
    const int steps = f.scale.count > 1, low_steps = AFFINE && f.minimum.count > 1;
    attempt(c, rank, low_rank, shift);
    for (int i = -steps; i <= steps; ++i)
      for (int j = -low_steps; j <= low_steps; ++j)
        if (i || j) attempt(c, scales.clamp(rank + set((float)i)), minima.clamp(low_rank + set((float)j)), shift);
    if (f.i.variants > 1) attempt(c, rank, low_rank, set(f.values.shift[0] + f.values.shift[1]) - shift);
    put(choice(g), c);
  }

  // Least-squares `d` (and `dmin`) for the codes and scales of now, if it lowers the error once rounded.
  void refit() {
    const F none = set(0);
    F b = none, s = none, cc = none, cm = none, mm = none, e = none;
    for (int g = 0; g < groups; ++g) {
      const Choice c = get<Choice>(choice(g));
      const F m = scales.value(c.rank);
      b = fma(m, c.sums.b, b), cc = fma(m * c.sums.cc, m, cc);
      if (!AFFINE) continue;
      const F l = minima.value(c.low_rank);
      s = fma(l, c.sums.s1, s), cm = fma(m * c.sums.c1, l, cm), mm = fma(c.weight * l, l, mm);
    }
    F up = quotient(b, cc), up_min = none;
    if (AFFINE) solve(b, s, cc, cm, mm, up, up_min);
    const F now = rounded(d + up), now_min = AFFINE ? rounded(dmin + up_min) : none;
    up = now - d, up_min = AFFINE ? now_min - dmin : none;
    e = up * (up * cc - set(2) * b);
    if (AFFINE) e = e + up_min * (set(2) * s + up_min * mm - set(2) * (up * cm));
    const M lower = less(e, none);
    d = select(lower, now, d), dmin = select(lower, now_min, dmin);
  }

  void write() {
    float values[kLanes], low_values[kLanes];
    alignas(64) int32_t t[kMaxSingles * kLanes];
    const int lanes = (int)(data.units - first_unit < kLanes ? data.units - first_unit : kLanes);
    const size_t count = (size_t)n * groups;
    F product = set(0);
    store(values, d), store(low_values, dmin);
    for (int l = 0; l < lanes; ++l) {
      data.d[first_unit + l] = stored[l].bits(values[l]);
      if (AFFINE) data.dmin[first_unit + l] = stored[l].bits(low_values[l]);
    }
    for (int g = 0; g < groups; ++g) {
      load_group(g);
      const Choice c = get<Choice>(choice(g));
      const F s = d * scales.value(c.rank), inverse = inverse_of(s), o = AFFINE ? dmin * minima.value(c.low_rank) : set(0);
      const F move = AFFINE ? o * inverse : set(0) - c.shift;
      F value[kMaxSingles];
      if (f.i.code_parity) {
        I code[kMaxSingles];
        even_values(s, c.shift, value, code);
        for (int j = 0; j < n; ++j) store(t + j * kLanes, code[j]);
      } else {
        for (int j = 0; j < n; ++j) store(t + j * kLanes, near.code(fma(load(x + j * kLanes), inverse, move)));
        for (int j = 0; data.product && j < n; ++j) value[j] = near(fma(load(x + j * kLanes), inverse, move)) + c.shift;
      }
      for (int j = 0; data.product && j < n; ++j) product = fma(load(w + j * kLanes) * load(x + j * kLanes), s * value[j] - o, product);
      for (int j = 0; j < n; j += kLanes) {
        F tile[kLanes];
        int32_t* const rows = t + j * kLanes;
        for (int l = 0; l < kLanes; ++l) tile[l] = load((const float*)rows + l * kLanes);
        transpose(tile);
        for (int l = 0; l < kLanes; ++l) store((float*)rows + l * kLanes, tile[l]);
        for (int l = 0; l < lanes; ++l) store_bytes(data.byte + (first_unit + l) * count + g * n + j, load(rows + l * kLanes));
      }
      float rank[kLanes], low_rank[kLanes], shift[kLanes];
      store(rank, c.rank), store(low_rank, c.low_rank), store(shift, c.shift);
      for (int l = 0; l < lanes; ++l) {
        const int64_t at = (first_unit + l) * groups + g;
        data.scale[at] = f.scale.stored[(int)rank[l]], data.variant[at] = f.i.variants > 1 && shift[l] != f.values.shift[0];
        if (AFFINE) data.minimum[at] = f.minimum.stored[(int)low_rank[l]];
      }
    }
    store(values, product);
    for (int l = 0; data.product && l < lanes; ++l) data.product[first_unit + l] = values[l];
  }

  void run(int64_t bundle) {
    first_unit = bundle * kLanes;
    float ups[kLanes], downs[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int exponent = data.exponent[unit(l)];
      stored[l] = {f.i.d_kind, power_of_two(exponent), power_of_two(-exponent)};
      ups[l] = stored[l].up, downs[l] = stored[l].down;
    }
    up = load(ups), down = load(downs);
    for (int g = 0; g < groups; ++g) propose(g);
    AFFINE ? share_affine() : share();
    for (int g = 0; g < groups; ++g) shortlist(g);
    refit();
    for (int round = 0; round < f.i.rounds; ++round) {
      for (int g = 0; g < groups; ++g) neighbours(g);
      refit();
    }
    write();
  }
};

static inline size_t lanes_bytes(const Encoder& e) { return 4 * (size_t)e.i.groups * (e.i.keep * kFormFloats + kChoiceFloats); }

template <class Near, bool AFFINE>
static void run_lanes(const Encoder& e, const EncodeData& data, void* scratch, int64_t i0, int64_t i1) {
  Lanes<Near, AFFINE> lanes(e, data, {(float*)scratch});
  for (int64_t i = i0; i < i1; ++i) lanes.run(i);
}

static void encode_lanes(const Encoder& e, const EncodeData& data, void* scratch, int64_t i0, int64_t i1) {
  if (e.i.affine) return run_lanes<Whole, true>(e, data, scratch, i0, i1);
  switch (e.values.bits) {
    case 0: return run_lanes<Whole, false>(e, data, scratch, i0, i1);
    case 2: return run_lanes<Tree<2>, false>(e, data, scratch, i0, i1);
    case 3: return run_lanes<Tree<3>, false>(e, data, scratch, i0, i1);
    case 4: return run_lanes<Tree<4>, false>(e, data, scratch, i0, i1);
    case 5: return run_lanes<Tree<5>, false>(e, data, scratch, i0, i1);
    default: return run_lanes<Cells, false>(e, data, scratch, i0, i1);
  }
}
