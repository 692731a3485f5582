// kernels/gae.py, ppo_policy.py and ppo_value.py on the CPU: see there for the formulas.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using at::vec::Vectorized;

constexpr int64_t kGrain = 1 << 15;  // tokens that are worth a thread
constexpr int64_t kBlock = 1024;     // tokens whose sums are kept in the narrow dtype
constexpr double kMaxLogRatio = 20;  // an exponent stays below: exp(88.8) is no fp32

template <typename W>
const W* data(const std::optional<Tensor>& x) {
  TORCH_CHECK(!x || x->is_contiguous());
  return x ? x->const_data_ptr<W>() : nullptr;
}

template <typename W>
W* written(const std::optional<Tensor>& x) {
  TORCH_CHECK(!x || x->is_contiguous());
  return x ? x->mutable_data_ptr<W>() : nullptr;
}

// spans of tokens that are worked on apart: sequences, or pieces of all that are worth a thread
struct Spans {
  int64_t count, tokens, width;
  std::vector<int64_t> ends;  // packed: B + 1

  explicit Spans(const Tensor& like)
      : count((like.numel() + kGrain - 1) / kGrain), tokens(like.numel()), width(kGrain) {
    TORCH_CHECK(like.is_contiguous());
  }

  Spans(const Tensor& like, const std::optional<Tensor>& cu_seqlens)
      : count(cu_seqlens ? cu_seqlens->size(0) - 1 : like.size(0)),
        tokens(like.numel()),
        width(like.size(-1)) {
    TORCH_CHECK(like.is_contiguous() && (cu_seqlens || like.dim() == 2));
    if (cu_seqlens) {
      const Tensor wide = cu_seqlens->to(at::kLong).contiguous();
      const int64_t* found = wide.const_data_ptr<int64_t>();
      ends.assign(found, found + count + 1);
      TORCH_CHECK(ends[0] == 0 && ends[count] == tokens && std::is_sorted(ends.begin(), ends.end()),
                  "need cu_seqlens rising from 0 to ", tokens);
    }
  }

  int64_t start(int64_t b) const { return ends.empty() ? std::min(b * width, tokens) : ends[b]; }

  template <typename F>
  void each(const F& visit) const {
    const int64_t grain = kGrain * count / std::max<int64_t>(tokens, 1);
    at::parallel_for(0, count, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t stop) {
      for (int64_t b = begin; b < stop; ++b) {
        visit(b, start(b), start(b + 1));
      }
    });
  }
};

enum Estimator { kK1, kK2, kK3, kK3Plus };

Estimator estimator_of(const std::string& name) {
  static const std::vector<std::string> names{"k1", "k2", "k3", "k3+"};
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK(found != names.end(), "need a KL estimator, got ", name);
  return static_cast<Estimator>(found - names.begin());
}

template <typename W>
W kl_estimate(W d, Estimator estimator) {
  if (estimator == kK1) {
    return d;
  }
  if (estimator == kK2) {
    return d * d / 2;
  }
  d = std::clamp(d, W(-kMaxLogRatio), W(kMaxLogRatio));
  return std::expm1(-d) + d;
}

// sums over a sequence, in the order of gae.py
enum GaeSum { kTokens, kAdvantages, kSquares, kKl, kPenalty, kFull, kScores, kGaeSums };

template <typename W>
struct GaeInputs {
  const W *rewards, *values, *logp, *ref_logp, *scores;
  const bool* mask;
  const W* bootstrap;
  W gamma, lam, kl_coef;
  Estimator estimator;
};

template <typename W>
void gae_sequence(const GaeInputs<W>& in, int64_t b, int64_t start, int64_t end, W* advantages,
                  W* returns, double* sums) {
  W state = in.bootstrap ? in.gamma * in.bootstrap[b] : W(0);
  const W decay = in.gamma * in.lam;
  for (int64_t t = end - 1; t >= start; --t) {
    if (in.mask && !in.mask[t]) {
      advantages[t] = returns[t] = 0;
      continue;
    }
    W reward = in.rewards ? in.rewards[t] : W(0);
    if (in.ref_logp) {
      const W d = in.logp[t] - in.ref_logp[t];
      const W penalty = in.kl_coef * kl_estimate(d, in.estimator);
      sums[kKl] += d;
      sums[kPenalty] += penalty;
      reward -= penalty;
    }
    if (sums[kFull] == 0) {  // the last that counts
      sums[kFull] = 1;
      if (in.scores) {
        reward += in.scores[b];
        sums[kScores] = in.scores[b];
      }
    }
    const W value = in.values ? in.values[t] : W(0);
    const W alone = reward - value, advantage = alone + state;
    // from what is known before: one product and sum a token wait for the last
    state = (in.gamma * value + decay * alone) + decay * state;
    advantages[t] = advantage;
    returns[t] = advantage + value;
    sums[kTokens] += 1;
    sums[kAdvantages] += advantage;
    sums[kSquares] += static_cast<double>(advantage) * advantage;
  }
}

void gae(const std::optional<Tensor>& rewards, const std::optional<Tensor>& values,
         const std::optional<Tensor>& logp, const std::optional<Tensor>& ref_logp,
         const std::optional<Tensor>& scores, const std::optional<Tensor>& mask,
         const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& bootstrap,
         double gamma, double lam, double kl_coef, const std::string& estimator,
         Tensor advantages, Tensor returns, Tensor sums) {
  const Spans sequences(advantages, cu_seqlens);
  std::vector<double> parts(sequences.count * kGaeSums);
  AT_DISPATCH_FLOATING_TYPES(advantages.scalar_type(), "gae", [&] {
    using W = scalar_t;
    const GaeInputs<W> in{data<W>(rewards), data<W>(values), data<W>(logp), data<W>(ref_logp),
                          data<W>(scores), data<bool>(mask), data<W>(bootstrap), static_cast<W>(gamma),
                          static_cast<W>(lam), static_cast<W>(kl_coef), estimator_of(estimator)};
    W* out = advantages.mutable_data_ptr<W>();
    W* out_returns = returns.mutable_data_ptr<W>();
    sequences.each([&](int64_t b, int64_t start, int64_t end) {
      gae_sequence(in, b, start, end, out, out_returns, &parts[b * kGaeSums]);
    });
  });
  double* total = sums.mutable_data_ptr<double>();
  std::fill_n(total, kGaeSums, 0.0);
  for (size_t i = 0; i < parts.size(); ++i) {
    total[i % kGaeSums] += parts[i];
  }
}

// a token's inputs as vectors: 0 where it does not count, so that NaN in padding goes nowhere
template <typename W>
struct Lanes {
  using Vec = Vectorized<W>;
  int64_t t, size;
  Vec keep;  // 1 or 0
  Vec on;    // the same as bits

  Lanes(const bool* mask, int64_t t, int64_t end)
      : t(t), size(std::min<int64_t>(Vec::size(), end - t)), keep(1) {
    if (mask == nullptr && size == Vec::size()) {
      on = keep > Vec(0);
      return;
    }
    W flags[Vec::size()] = {};
    if (mask != nullptr && size == Vec::size()) {
      for (int i = 0; i < Vec::size(); ++i) {  // of a known length: a vector's conversion
        flags[i] = static_cast<W>(mask[t + i]);
      }
    } else {
      for (int64_t i = 0; i < size; ++i) {
        flags[i] = mask == nullptr || mask[t + i] ? 1 : 0;
      }
    }
    keep = Vec::loadu(flags);
    on = keep > Vec(0);
  }

  Vec where(const Vec& condition, const Vec& yes, const Vec& no) const {
    return Vec::blendv(no, yes, condition);
  }

  Vec kept(const Vec& x) const { return Vec::blendv(Vec(0), x, on); }

  Vec read(const W* from) const {
    return kept(size == Vec::size() ? Vec::loadu(from + t) : Vec::loadu(from + t, size));
  }

  void write(const Vec& x, W* to) const { x.store(to + t, size); }
};

template <typename W>
double total_of(const Vectorized<W>& x) {
  W lanes[Vectorized<W>::size()];
  x.store(lanes);
  double total = 0;
  for (const W lane : lanes) {
    total += lane;
  }
  return total;
}

// sums over a span of tokens: in vectors over a block, then in double
template <typename W, int kSums>
struct Sums {
  Vectorized<W> block[kSums];
  double total[kSums] = {};

  Sums() { std::fill_n(block, kSums, Vectorized<W>(0)); }

  void close_block() {
    for (int i = 0; i < kSums; ++i) {
      total[i] += total_of(block[i]);
      block[i] = Vectorized<W>(0);
    }
  }
};

template <typename W, typename F>
void each_lanes(const bool* mask, int64_t start, int64_t end, const F& visit) {
  for (int64_t t = start; t < end; t += Vectorized<W>::size()) {
    visit(Lanes<W>(mask, t, end));
  }
}

double larger(double a, double b) { return std::isnan(b) || b > a ? b : a; }  // NaN stays

// calls `visit(b, start, end, parts)` for every span, adds the parts up in order and stores them
template <int kSums, typename F>
double sum_spans(const Spans& spans, Tensor& sums, const F& visit) {
  std::vector<double> parts(spans.count * kSums), largest(spans.count);
  spans.each([&](int64_t b, int64_t start, int64_t end) {
    largest[b] = visit(b, start, end, &parts[b * kSums]);
  });
  double total[kSums] = {};
  for (size_t i = 0; i < parts.size(); ++i) {
    total[i % kSums] += parts[i];
  }
  std::copy_n(total, kSums, sums.mutable_data_ptr<double>());
  return std::accumulate(largest.begin(), largest.end(), 0.0, larger);
}

enum Form { kClip, kCispo, kApa, kAwr };

Form form_of(const std::string& name) {
  static const std::vector<std::string> names{"clip", "cispo", "apa", "awr"};
  const auto found = std::find(names.begin(), names.end(), name);
  TORCH_CHECK(found != names.end(), "need a form of the loss, got ", name);
  return static_cast<Form>(found - names.begin());
}

// sums over tokens, in the order of ppo_policy.py
enum PolicySum {
  kLoss, kCount, kSequences, kRatio, kDeviation, kBelow, kAbove, kPast, kPpoKl, kApproxKl,
  kRefKl, kEntropy, kPolicySums
};

template <typename W>
struct Policy {
  using Vec = Vectorized<W>;
  const W *logp, *advantages, *old_logp;
  const bool* mask;
  const W *ref_logp, *entropy, *is_weight;
  Form form;
  bool by_sequence, each, mean;
  W low, high, dual, temperature, kl_coef, entropy_coef;
  Estimator estimator;
  W *dlogp, *dentropy;

  Vec exp_of(const Vec& x) const {
    return at::vec::clamp(x, Vec(-kMaxLogRatio), Vec(kMaxLogRatio)).exp();
  }

  struct Surrogate {
    Vec loss, slope, below, above, past;  // 1 or 0 where a bound binds
  };

  Surrogate surrogate(const Lanes<W>& at, const Vec& x, const Vec& d, const Vec& ratio,
                      const Vec& outside, const Vec& A) const {
    const Vec zero(0), one(1);
    if (form == kApa) {
      const Vec error = d - A / Vec(temperature);
      return {error * error, Vec(2) * error, zero, zero, zero};
    }
    if (form == kAwr) {
      const Vec slope = at::vec::minimum(A / Vec(temperature), Vec(kMaxLogRatio)).exp().neg();
      return {slope * x, slope, zero, zero, zero};
    }
    const Vec bounded = at::vec::clamp(ratio, Vec(1 - low), Vec(1 + high));
    const Vec under = ratio < Vec(1 - low), over = ratio > Vec(1 + high);
    if (form == kCispo) {
      const Vec slope = (bounded * A).neg();
      return {slope * x, slope, under & one, over & one, zero};
    }
    const Vec negative = A < zero, binds = (under & negative) | (over & (A > zero));
    const Vec past = (ratio > Vec(dual)) & negative;
    const Vec free = (ratio * A).neg();
    const Vec loss = at.where(binds, (bounded * A).neg(), free);
    return {at.where(past, (Vec(dual) * A).neg(), loss),
            at.where(binds | past | outside, zero, free), under & negative & one,
            over & (A > zero) & one, past & one};
  }

  // exp(-d) - 1 + d by Taylor, where 1 would swallow d
  static Vec series(const Vec& d) {
    constexpr int kTerms = std::is_same_v<W, double> ? 16 : 9;
    Vec tail(1);
    for (int n = kTerms; n > 2; --n) {
      tail = Vec(1) - d * Vec(W(1) / n) * tail;
    }
    return d * d * Vec(W(0.5)) * tail;
  }

  void kl(const Lanes<W>& at, const Vec& d, Vec& loss, Vec& slope, Vec& sum) const {
    if (ref_logp == nullptr) {
      return;
    }
    Vec k = d, bent(1);
    if (estimator == kK2) {
      k = d * d * Vec(W(0.5));
      bent = d;
    } else if (estimator != kK1) {
      const Vec bound = at::vec::clamp(d, Vec(-kMaxLogRatio), Vec(kMaxLogRatio));
      const Vec far = bound.neg().exp() - Vec(1) + bound;
      k = at.where(bound.abs() < Vec(W(0.5)), series(bound), far);
      bent = estimator == kK3Plus ? d : at.where(d.abs() > Vec(kMaxLogRatio), Vec(0), bound - k);
    }
    if (kl_coef != 0) {  // else a metric, which may be infinite
      loss = loss + Vec(kl_coef) * k;
      slope = slope + Vec(kl_coef) * bent;
    }
    sum = sum + k;  // 0 where d is
  }

  // the sums of a span, and its largest ratio
  double operator()(int64_t b, int64_t start, int64_t end, double* out) const {
    W per_token = 1;
    Vec mean_log_ratio(0);
    if (by_sequence || mean) {
      Sums<W, 2> found;
      each_lanes<W>(mask, start, end, [&](const Lanes<W>& at) {
        found.block[0] = found.block[0] + at.keep;
        if (by_sequence && old_logp) {
          found.block[1] = found.block[1] + (at.read(logp) - at.read(old_logp));
        }
        if ((at.t - start) % kBlock == 0) {
          found.close_block();
        }
      });
      found.close_block();
      const double count = std::max(found.total[0], 1.0);
      mean_log_ratio = Vec(static_cast<W>(found.total[1] / count));
      per_token = mean ? static_cast<W>(1 / count) : W(1);
    }
    Sums<W, kPolicySums> sums;
    Vec largest(0);
    const Vec zero(0), one(1);
    each_lanes<W>(mask, start, end, [&](const Lanes<W>& at) {
      const Vec x = at.read(logp), A = at.kept(each ? Vec(advantages[b]) : at.read(advantages));
      const Vec log_ratio = old_logp ? x - at.read(old_logp) : zero;
      const Vec used_log_ratio = by_sequence ? mean_log_ratio : log_ratio;
      const Vec ratio = exp_of(used_log_ratio), d = ref_logp ? x - at.read(ref_logp) : x;
      const Vec outside = used_log_ratio.abs() > Vec(kMaxLogRatio);
      Surrogate part = surrogate(at, x, d, ratio, outside, A);
      if (is_weight) {
        const Vec importance = at.read(is_weight);
        part.loss = part.loss * importance;
        part.slope = part.slope * importance;
      }
      kl(at, d, part.loss, part.slope, sums.block[kRefKl]);
      if (entropy) {
        const Vec H = at.read(entropy);
        part.loss = entropy_coef == 0 ? part.loss : part.loss - Vec(entropy_coef) * H;
        sums.block[kEntropy] = sums.block[kEntropy] + H;
      }
      if (dlogp) {
        at.write(at.kept(Vec(per_token) * part.slope), dlogp);
      }
      if (dentropy) {
        at.write(Vec(-entropy_coef * per_token) * at.keep, dentropy);
      }
      const Vec clamped = at::vec::clamp(log_ratio, Vec(-kMaxLogRatio), Vec(kMaxLogRatio));
      const auto add = [&](PolicySum name, const Vec& value) {
        sums.block[name] = sums.block[name] + value;
      };
      add(kLoss, at.kept(part.loss));
      add(kCount, at.keep);
      add(kRatio, ratio * at.keep);
      add(kDeviation, (ratio - one).abs() * at.keep);
      add(kBelow, part.below * at.keep);
      add(kAbove, part.above * at.keep);
      add(kPast, part.past * at.keep);
      add(kPpoKl, clamped.neg());
      add(kApproxKl, clamped * clamped * Vec(W(0.5)));
      largest = at::vec::maximum(largest, ratio * at.keep);
      if ((at.t - start) % kBlock == 0) {
        sums.close_block();
      }
    });
    sums.close_block();
    std::copy_n(sums.total, kPolicySums, out);
    out[kLoss] *= per_token;
    out[kSequences] = out[kCount] > 0;
    W lanes[Vec::size()];
    largest.store(lanes);
    return std::accumulate(lanes, lanes + Vec::size(), 0.0, larger);
  }
};

void policy(const Tensor& logp, const Tensor& advantages, const std::optional<Tensor>& old_logp,
            const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens,
            const std::optional<Tensor>& ref_logp, const std::optional<Tensor>& entropy,
            const std::optional<Tensor>& is_weight, const std::string& form, bool by_sequence,
            double low, double high, double dual, double temperature, double kl_coef,
            double entropy_coef, const std::string& estimator, bool mean, bool spans,
            std::optional<Tensor> dlogp, std::optional<Tensor> dentropy, Tensor sums) {
  TORCH_CHECK(advantages.is_contiguous());
  AT_DISPATCH_FLOATING_TYPES(logp.scalar_type(), "policy", [&] {
    using W = scalar_t;
    const auto narrow = [](double x) { return static_cast<W>(x); };
    const Policy<W> loss{logp.const_data_ptr<W>(), advantages.const_data_ptr<W>(), data<W>(old_logp),
                         data<bool>(mask), data<W>(ref_logp), data<W>(entropy), data<W>(is_weight),
                         form_of(form), by_sequence, advantages.sizes() != logp.sizes(), mean,
                         narrow(low), narrow(high), narrow(dual), narrow(temperature),
                         narrow(kl_coef), narrow(entropy_coef), estimator_of(estimator), written<W>(dlogp),
                         written<W>(dentropy)};
    const Spans where = spans ? Spans(logp, cu_seqlens) : Spans(logp);
    sums[-1] = sum_spans<kPolicySums>(where, sums, loss);
  });
}

// sums of numbers and their squares, from those of their distances to an anchor
void from_anchor(double anchor, double count, double& total, double& squares) {
  squares += 2 * anchor * total + count * anchor * anchor;
  total += count * anchor;
}

// sums over tokens, in the order of ppo_value.py
enum ValueSum {
  kValueLoss, kValueCount, kValueSequences, kClipped, kValues, kReturns, kReturnsSquared, kError,
  kErrorSquared, kValueSums
};

template <typename W>
struct Value {
  using Vec = Vectorized<W>;
  const W *values, *old_values, *returns;
  const bool* mask;
  W clip;
  bool mean;
  W* dvalues;

  double operator()(int64_t b, int64_t start, int64_t end, double* out) const {
    W per_token = 1;
    if (mean) {
      const int64_t count =
          mask ? std::count(mask + start, mask + end, true) : end - start;
      per_token = 1 / static_cast<W>(std::max<int64_t>(count, 1));
    }
    // of numbers far from 0 little would be left of the variance: squares of distances to one
    const int64_t some = mask ? std::find(mask + start, mask + end, true) - mask : start;
    const W return_anchor = some < end ? returns[some] : W(0);
    const W error_anchor = some < end ? returns[some] - values[some] : W(0);
    Sums<W, kValueSums> sums;
    each_lanes<W>(mask, start, end, [&](const Lanes<W>& at) {
      const Vec V = at.read(values), R = at.read(returns), error = R - V;
      const Vec away = at.kept(R - Vec(return_anchor)), error_away = at.kept(error - Vec(error_anchor));
      const Vec square = error * error;
      Vec miss = square, binds(0);
      if (old_values) {
        const Vec old = at.read(old_values), moved = V - old;
        const Vec bounded = R - (old + at::vec::clamp(moved, Vec(-clip), Vec(clip)));
        miss = bounded * bounded;
        // else rounding decides: one is the other, by another way
        binds = (moved.abs() > Vec(clip)) & (miss > square);
      }
      if (dvalues) {
        at.write(at.where(binds, Vec(0), Vec(-per_token) * error), dvalues);
      }
      const auto add = [&](ValueSum name, const Vec& value) {
        sums.block[name] = sums.block[name] + value;
      };
      add(kValueLoss, at::vec::maximum(miss, square) * Vec(W(0.5)));
      add(kValueCount, at.keep);
      add(kClipped, binds & Vec(1));
      add(kValues, V);
      add(kReturns, away);
      add(kReturnsSquared, away * away);
      add(kError, error_away);
      add(kErrorSquared, error_away * error_away);
      if ((at.t - start) % kBlock == 0) {
        sums.close_block();
      }
    });
    sums.close_block();
    std::copy_n(sums.total, kValueSums, out);
    out[kValueLoss] *= per_token;
    out[kValueSequences] = out[kValueCount] > 0;
    from_anchor(return_anchor, out[kValueCount], out[kReturns], out[kReturnsSquared]);
    from_anchor(error_anchor, out[kValueCount], out[kError], out[kErrorSquared]);
    return 0;
  }
};

void value(const Tensor& values, const std::optional<Tensor>& old_values, const Tensor& returns,
           const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens, double clip,
           bool mean, bool spans, std::optional<Tensor> dvalues, Tensor sums) {
  TORCH_CHECK(returns.is_contiguous());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "value", [&] {
    using W = scalar_t;
    const Value<W> loss{values.const_data_ptr<W>(), data<W>(old_values), returns.const_data_ptr<W>(),
                        data<bool>(mask), static_cast<W>(clip), mean,
                        written<W>(dvalues)};
    sum_spans<kValueSums>(spans ? Spans(values, cu_seqlens) : Spans(values), sums, loss);
  });
}

void whiten(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& moments,
            bool unbiased, double eps, Tensor out) {
  TORCH_CHECK(x.is_contiguous() && moments.is_contiguous());
  const double* moment = moments.const_data_ptr<double>();
  const double n = moment[0], mean = moment[1] / std::max(n, 1.0);
  const double around = std::max(moment[2] - n * mean * mean, 0.0);
  const double variance = around / std::max(n - (unbiased ? 1 : 0), 1.0);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "whiten", [&] {
    const auto shift = static_cast<scalar_t>(mean);
    const auto scale = static_cast<scalar_t>(1 / std::sqrt(variance + eps));
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    const bool* keep = data<bool>(mask);
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t y = (from[i] - shift) * scale;
        to[i] = keep == nullptr || keep[i] ? y : scalar_t(0);
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY(fastpref_ppo, m) {
  m.def(
      "gae(Tensor? rewards, Tensor? values, Tensor? logp, Tensor? ref_logp, Tensor? scores, "
      "Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap, float gamma, float lam, float kl_coef, "
      "str estimator, Tensor(a!) advantages, Tensor(b!) returns, Tensor(c!) sums) -> ()");
  m.def(
      "policy(Tensor logp, Tensor advantages, Tensor? old_logp, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor? ref_logp, Tensor? entropy, Tensor? is_weight, str form, bool by_sequence, "
      "float clip_low, float clip_high, float dual_clip, float temperature, float kl_coef, "
      "float entropy_coef, str estimator, bool mean, bool spans, Tensor(a!)? dlogp, "
      "Tensor(b!)? dentropy, Tensor(c!) sums) -> ()");
  m.def(
      "value(Tensor values, Tensor? old_values, Tensor returns, Tensor? mask, Tensor? cu_seqlens, "
      "float clip, bool mean, bool spans, Tensor(a!)? dvalues, Tensor(b!) sums) "
      "-> ()");
  m.def(
      "whiten(Tensor x, Tensor? mask, Tensor moments, bool unbiased, float eps, Tensor(a!) out) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(fastpref_ppo, CPU, m) {
  m.impl("gae", &gae);
  m.impl("policy", &policy);
  m.impl("value", &value);
  m.impl("whiten", &whiten);
}
