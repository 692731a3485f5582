// The row functions of kernels/logp_rows.py, one read of each slab: see there for the
// formulas and for what a row carries from slab to slab, and logits.py for the transform.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;
using at::vec::Vectorized;

constexpr int64_t kIgnore = -100;
constexpr double kLowest = -1e30;  // of distances: finite, since 0 * -inf is NaN
constexpr int64_t kBlock = 1024;   // columns: what is read once and then stays in the L1 cache
constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// what a row carries, each a row of the state (8, R)
enum State { kMax, kTotal, kLabel, kLogits, kWeighted, kSquares, kDrop, kShrink, kStateRows };

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
Vectorized<T> load(const T* from, int64_t i, int64_t size) {
  constexpr int64_t width = Vectorized<T>::size();
  return size - i >= width ? Vectorized<T>::loadu(from + i) : Vectorized<T>::loadu(from + i, size - i);
}

// lanes past the end take `fill`
template <typename T>
Vectorized<T> only(const Vectorized<T>& x, T fill, int64_t i, int64_t size) {
  constexpr int64_t width = Vectorized<T>::size();
  return size - i >= width ? x : Vectorized<T>::set(Vectorized<T>(fill), x, size - i);
}

template <typename T>
void store(const Vectorized<T>& x, T* to, int64_t i, int64_t size) {
  x.store(to + i, std::min<int64_t>(Vectorized<T>::size(), size - i));
}

template <typename T>
void read(const T* from, Wide<T>* to, int64_t size) {
  constexpr int64_t width = Vectorized<T>::size();
  for (int64_t i = 0; i < size; i += width) {
    const auto x = load(from, i, size);
    if constexpr (std::is_same_v<T, Wide<T>>) {
      store(x, to, i, size);
    } else {
      const auto [low, high] = at::vec::convert_to_float<T>(x);
      store(low, to, i, size);
      if (i + width / 2 < size) {
        store(high, to, i + width / 2, size);
      }
    }
  }
}

// z = scale * (raw + bias), or cap * tanh of that
template <typename W>
struct Transform {
  W scale, cap;  // cap 0: none
  const W* bias;

  void apply(W* x, int64_t begin, int64_t size) const {
    using Vec = Vectorized<W>;
    if (bias == nullptr && scale == 1 && cap == 0) {
      return;
    }
    for (int64_t i = 0; i < size; i += Vec::size()) {
      Vec z = load(x, i, size);
      if (bias != nullptr) {
        z = z + load(bias + begin, i, size);
      }
      z = z * Vec(scale);
      store(cap > 0 ? z.tanh() * Vec(cap) : z, x, i, size);
    }
  }
};

template <typename T>
void write(const Wide<T>* from, T* to, int64_t size) {
  constexpr int64_t width = Vectorized<T>::size();
  for (int64_t i = 0; i < size; i += width) {
    if constexpr (std::is_same_v<T, Wide<T>>) {
      store(load(from, i, size), to, i, size);
    } else {
      const auto low = load(from, i, size);
      const auto high =
          i + width / 2 < size ? load(from, i + width / 2, size) : Vectorized<float>(0.f);
      store(at::vec::convert_from_float<T>(low, high), to, i, size);
    }
  }
}

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

template <typename W>
W largest(const W* x, int64_t size) {
  constexpr W lowest = -std::numeric_limits<W>::infinity();
  Vectorized<W> most(lowest);
  for (int64_t i = 0; i < size; i += Vectorized<W>::size()) {
    most = at::vec::maximum(most, only(load(x, i, size), lowest, i, size));  // NaN stays
  }
  W lanes[Vectorized<W>::size()];
  most.store(lanes);
  W result = lowest;
  for (const W lane : lanes) {
    result = std::isnan(lane) || lane > result ? lane : result;
  }
  return result;
}

template <typename W>
double sum(const W* x, int64_t size) {
  constexpr int64_t lanes = 16;  // independent sums, which the compiler turns into vectors
  double parts[lanes] = {};      // logits cancel in their mean
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    for (int64_t k = 0; k < lanes; ++k) {
      parts[k] += x[i + k];
    }
  }
  double total = 0;
  for (; i < size; ++i) {
    total += x[i];
  }
  for (const double part : parts) {
    total += part;
  }
  return total;
}

// buffers of one thread, grown to the widest block it meets
template <typename W>
struct Scratch {
  std::vector<W> x, weighted;
  Scratch(int64_t size, bool two) : x(size), weighted(two ? size : 0) {}
};

struct Wanted {
  bool slopes, entropy, mean, squares;
};

template <typename T, typename E>
void add_row(const T* raw, int64_t V, int64_t block, int64_t label,
             const Transform<Wide<T>>& transform, double* state, int64_t rows, E* exps,
             Wide<T>* weighted, const Wanted& want, Scratch<Wide<T>>& scratch) {
  using W = Wide<T>;
  using Vec = Vectorized<W>;
  const auto at = [&](State name) -> double& { return state[name * rows]; };
  const W first = static_cast<W>(at(kMax));
  W top = first;
  double total = at(kTotal), entropy = at(kWeighted), squares = at(kSquares), logits = at(kLogits);
  W* x = scratch.x.data();
  W* xe = weighted ? scratch.weighted.data() : nullptr;
  const Vec per_cap(transform.cap > 0 ? 1 / transform.cap : W(0));
  for (int64_t begin = 0; begin < V; begin += block) {
    const int64_t size = std::min(block, V - begin);
    read(raw + begin, x, size);
    transform.apply(x, begin, size);
    if (label >= begin && label < begin + size) {
      at(kLabel) = x[label - begin];
    }
    if (want.mean) {
      logits += sum(x, size);
    }
    const W here = largest(x, size);
    const W before = top;
    top = std::isnan(here) || here > top ? here : top;
    const Vec shift(top);
    const double drop = std::max(static_cast<double>(before) - top, kLowest);
    const double shrink = std::exp(drop);
    entropy = shrink * (entropy + drop * total);
    total *= shrink;
    squares *= shrink * shrink;
    for (int64_t chunk = 0; chunk < size; chunk += kBlock) {  // long sums would round too much
      const int64_t stop = std::min(chunk + kBlock, size);
      Vec exp_sum(0), weighted_sum(0), square_sum(0);
      for (int64_t i = chunk; i < stop; i += Vec::size()) {
        const Vec z = load(x, i, size);
        Vec d = z - shift;
        if (want.entropy) {
          d = at::vec::maximum(d, Vec(kLowest));
        }
        Vec e = only(d.exp(), W(0), i, size);
        exp_sum = exp_sum + e;
        if (want.entropy) {
          weighted_sum = weighted_sum + d * e;
        }
        if (want.squares) {
          square_sum = square_sum + e * e;
        }
        if (want.slopes && transform.cap > 0) {
          const Vec tanh = z * per_cap;
          e = e * (Vec(1) - tanh * tanh);
        }
        if (exps) {
          store(e, x, i, size);
        }
        if (weighted) {
          store(d * e, xe, i, size);
        }
      }
      total += total_of(exp_sum);
      entropy += total_of(weighted_sum);
      squares += total_of(square_sum);
    }
    if (want.slopes && label >= begin && label < begin + size) {
      for (W* part : {x, xe}) {  // a frozen weight's products leave the label out
        if (part != nullptr) {
          part[label - begin] = 0;
        }
      }
    }
    if (exps) {
      write(x, exps + begin, size);
    }
    if (weighted) {
      write(xe, weighted + begin, size);
    }
  }
  at(kMax) = top;
  at(kTotal) = total;
  at(kWeighted) = entropy;
  at(kSquares) = squares;
  at(kLogits) = logits;
  at(kDrop) = std::max(static_cast<double>(first) - top, kLowest);
  at(kShrink) = std::exp(at(kDrop));
}

template <typename T>
T* data(const std::optional<Tensor>& x) {
  return x.has_value() ? x->mutable_data_ptr<T>() : nullptr;
}

bool dense(const Tensor& x) { return x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1); }

int64_t row_stride(const std::optional<Tensor>& x) { return x.has_value() ? x->stride(0) : 0; }

struct TransformOf {
  double scale, cap;
  const std::optional<Tensor>& bias;

  template <typename W>
  Transform<W> as() const {
    return {static_cast<W>(scale), static_cast<W>(cap), bias ? bias->const_data_ptr<W>() : nullptr};
  }
};

template <typename T, typename E>
void add_typed(const Tensor& raw, int64_t start, const Tensor& target, Tensor& state,
               const TransformOf& of, const std::optional<Tensor>& exps,
               const std::optional<Tensor>& weighted, const Wanted& want) {
  const auto transform = of.as<Wide<T>>();
  const int64_t R = raw.size(0), V = raw.size(1);
  // what is kept is relative to one maximum: it must be known before the first write
  const int64_t block = exps || weighted ? V : std::min(V, kBlock);
  const T* from = raw.const_data_ptr<T>();
  E* to = data<E>(exps);
  Wide<T>* to_weighted = data<Wide<T>>(weighted);
  double* carried = state.mutable_data_ptr<double>();
  const int64_t* labels = target.const_data_ptr<int64_t>();
  at::parallel_for(0, R, std::max<int64_t>(1, kGrain / V), [&](int64_t begin, int64_t end) {
    Scratch<Wide<T>> scratch(block, weighted.has_value());
    for (int64_t r = begin; r < end; ++r) {
      add_row<T, E>(from + r * raw.stride(0), V, block, labels[r] - start, transform, carried + r,
                    R, to ? to + r * row_stride(exps) : nullptr,
                    to_weighted ? to_weighted + r * row_stride(weighted) : nullptr, want, scratch);
    }
  });
}

void add_rows(const Tensor& raw, int64_t start, const Tensor& target, Tensor state, double scale,
              double cap, const std::optional<Tensor>& bias, const std::optional<Tensor>& exps,
              const std::optional<Tensor>& weighted, bool slopes, bool entropy, bool mean,
              bool squares) {
  TORCH_CHECK(state.size(0) == kStateRows && state.is_contiguous() && target.is_contiguous());
  TORCH_CHECK(dense(raw) && (!exps || dense(*exps)) && (!weighted || dense(*weighted)));
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->size(0) == raw.size(1)));
  const Wanted want{slopes, entropy, mean, squares};
  const TransformOf transform{scale, cap, bias};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, raw.scalar_type(), "add_rows", [&] {
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (exps && exps->scalar_type() == at::kBFloat16) {
        return add_typed<float, at::BFloat16>(raw, start, target, state, transform, exps, weighted,
                                              want);
      }
      if (exps && exps->scalar_type() == at::kHalf) {
        return add_typed<float, at::Half>(raw, start, target, state, transform, exps, weighted,
                                          want);
      }
    }
    add_typed<scalar_t, Wide<scalar_t>>(raw, start, target, state, transform, exps, weighted, want);
  });
}

// what the gradient of a row with respect to its logits needs
template <typename W>
struct RowGrad {
  W logp, max, log_total, g, h, entropy, cap, shift;
  bool with_entropy, capped, kept;

  W log_scale() const { return kept ? (shift - max) - log_total : -log_total; }

  W at_label() const {  // not from the slab: 1 - p is lost where p is near 1
    W d = -g * std::expm1(logp);
    if (with_entropy) {
      d -= h * std::exp(logp) * (logp + entropy);
    }
    if (capped) {
      const W tanh = ((logp + log_total) + max) / cap;  // small ones first: near 1 it is squared
      d *= 1 - tanh * tanh;
    }
    return d;
  }
};

template <typename W>
void bend(const RowGrad<W>& row, W* x, int64_t size) {
  using Vec = Vectorized<W>;
  const W log_scale = row.log_scale();
  const Vec top(row.max), by(std::exp(log_scale)), log_by(log_scale), g(row.g), h(row.h);
  const Vec entropy(row.entropy), shift(row.shift), one(1);
  const Vec per_cap(row.capped ? 1 / row.cap : W(0)), tiny(std::numeric_limits<W>::min());
  const Vec log_tiny(std::log(std::numeric_limits<W>::min()));
  const bool plain = !row.with_entropy && !row.capped;
  for (int64_t i = 0; i < size; i += Vec::size()) {
    Vec e = load(x, i, size);
    Vec logp = log_by, z = e;
    if (!row.kept) {
      const Vec d = e - top;
      logp = at::vec::maximum(d, log_tiny) + log_by;  // finite where p is 0, and small times h
      e = d.exp();
    } else if (!plain) {
      const Vec d = at::vec::maximum(e, tiny).log();  // finite where p is 0
      logp = d + log_by;
      z = d + shift;
    }
    const Vec slope = row.with_entropy ? (logp + entropy) * h + g : g;
    Vec grad = (e * by * slope).neg();
    if (row.capped) {
      const Vec tanh = z * per_cap;
      grad = grad * (one - tanh * tanh);
    }
    store(grad, x, i, size);
  }
}

template <typename S, typename T>
void gradient_typed(const Tensor& source, const std::optional<Tensor>& shift, int64_t start,
                    const Tensor& target, const Tensor& values, bool with_entropy,
                    const TransformOf& of, Tensor& out) {
  using W = Wide<T>;
  const auto transform = of.as<W>();
  const int64_t R = source.size(0), V = source.size(1);
  const S* from = source.const_data_ptr<S>();
  T* to = out.mutable_data_ptr<T>();
  const int64_t* labels = target.const_data_ptr<int64_t>();
  const W* shifts = shift ? shift->const_data_ptr<W>() : nullptr;
  const W* value = values.const_data_ptr<W>();
  const int64_t block = std::min(V, kBlock), rows = values.stride(0);
  at::parallel_for(0, R, std::max<int64_t>(1, kGrain / V), [&](int64_t begin, int64_t end) {
    Scratch<W> scratch(block, false);
    for (int64_t r = begin; r < end; ++r) {
      T* row_out = to + r * out.stride(0);
      if (labels[r] == kIgnore) {  // padding may hold NaN, and 0 * NaN is NaN
        std::fill_n(row_out, V, T(0));
        continue;
      }
      const auto at = [&](int64_t i) { return value[i * rows + r]; };
      const RowGrad<W> row{at(0), at(1), at(2), at(3), with_entropy ? at(4) : W(0),
                           with_entropy ? at(5) : W(0), transform.cap,
                           shifts ? shifts[r] : W(0), with_entropy, transform.cap > 0,
                           shifts != nullptr};
      for (int64_t c = 0; c < V; c += block) {
        const int64_t size = std::min(block, V - c);
        read(from + r * source.stride(0) + c, scratch.x.data(), size);
        if (!row.kept) {
          transform.apply(scratch.x.data(), c, size);
        }
        bend(row, scratch.x.data(), size);
        write(scratch.x.data(), row_out + c, size);
      }
      const int64_t label = labels[r] - start;
      if (label >= 0 && label < V) {
        row_out[label] = static_cast<T>(row.at_label());
      }
    }
  });
}

void gradient_rows(const Tensor& source, int64_t start, const Tensor& target, const Tensor& values,
                   bool with_entropy, const std::optional<Tensor>& shift, double scale, double cap,
                   const std::optional<Tensor>& bias, Tensor out) {
  TORCH_CHECK(target.is_contiguous() && (!shift || shift->is_contiguous()));
  TORCH_CHECK(dense(source) && dense(out));
  TORCH_CHECK(dense(values) && values.size(0) == (with_entropy ? 6 : 4));
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->size(0) == source.size(1)));
  const TransformOf transform{scale, cap, bias};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, out.scalar_type(), "gradient_rows", [&] {
        if (source.scalar_type() == out.scalar_type()) {
          gradient_typed<scalar_t, scalar_t>(source, shift, start, target, values, with_entropy,
                                             transform, out);
        } else if constexpr (std::is_same_v<scalar_t, float>) {  // kept in the inputs' dtype
          if (source.scalar_type() == at::kHalf) {
            gradient_typed<at::Half, float>(source, shift, start, target, values, with_entropy,
                                            transform, out);
          } else {
            gradient_typed<at::BFloat16, float>(source, shift, start, target, values, with_entropy,
                                                transform, out);
          }
        } else {
          TORCH_CHECK(false, "need ", out.scalar_type(), ", got ", source.scalar_type());
        }
      });
}

}  // namespace

TORCH_LIBRARY(fastpref_rows, m) {
  m.def(
      "add(Tensor raw, int start, Tensor target, Tensor(a!) state, float scale, float cap, "
      "Tensor? bias, Tensor(b!)? exps, Tensor(c!)? weighted, bool slopes, bool entropy, bool mean, "
      "bool squares) -> ()");
  m.def(
      "gradient(Tensor source, int start, Tensor target, Tensor values, bool with_entropy, "
      "Tensor? shift, float scale, float cap, Tensor? bias, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(fastpref_rows, CPU, m) {
  m.impl("add", &add_rows);
  m.impl("gradient", &gradient_rows);
}
