// The forecast of bfloat16 tensors on a CPU: one pass over memory, sums in fp32, one rounding at the end. Every other
// case is torch's own; vllm_omni/kernels/ops.py decides, and has the torch twin of the same signature.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// The inner loops are plain C++ that the compiler vectorises, once per instruction set; the machine that runs picks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_X86 __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_X86
#endif

namespace {

constexpr int kMaxTerms = 8;           // of one row; predictors look at three anchors at most
constexpr std::int64_t kSpan = 1024;  // elements whose fp32 sums stay in the first-level cache
constexpr std::int64_t kGrain = 16;   // spans that are worth a thread

// The terms of one row of a batch.
struct RowTerms {
  const at::BFloat16* residual[kMaxTerms];
  float weight[kMaxTerms];
  int count = 0;
};

// Conversions that vectorise: c10's own branch on NaN, element by element.
inline float load(const at::BFloat16* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(p->x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(at::BFloat16* p, float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  p->x = static_cast<std::uint16_t>(v != v ? 0x7FC0u : rounded);
}

EVERY_X86 void forecast_span(at::BFloat16* out, const at::BFloat16* x, const RowTerms& terms, std::int64_t offset,
                             std::int64_t n) {
  float sum[kSpan];
  for (std::int64_t i = 0; i < n; ++i) sum[i] = load(x + i);
  for (int j = 0; j < terms.count; ++j) {
    const at::BFloat16* r = terms.residual[j] + offset;
    const float w = terms.weight[j];
    for (std::int64_t i = 0; i < n; ++i) sum[i] += w * load(r + i);
  }
  for (std::int64_t i = 0; i < n; ++i) store(out + i, sum[i]);
}

// Checks the arguments, makes `residuals` contiguous, and lists the terms of every row of `x`.
std::vector<RowTerms> terms_by_row(const at::Tensor& x, std::vector<at::Tensor>& residuals,
                                   at::ArrayRef<double> weights, at::IntArrayRef first_rows) {
  TORCH_CHECK(x.dim() >= 2 && x.scalar_type() == at::kBFloat16, "forecast: x must be bfloat16 and have rows");
  TORCH_CHECK(residuals.size() == weights.size() && residuals.size() == first_rows.size(), "forecast: ",
              residuals.size(), " residuals, ", weights.size(), " weights and ", first_rows.size(),
              " first rows must be as many");
  std::vector<RowTerms> terms(static_cast<std::size_t>(x.size(0)));
  for (std::size_t j = 0; j < residuals.size(); ++j) {
    auto& r = residuals[j];
    TORCH_CHECK(r.device() == x.device() && r.scalar_type() == x.scalar_type() && r.dim() == x.dim() &&
                    r.sizes().slice(1) == x.sizes().slice(1),
                "forecast: residual ", j, " of ", r.sizes(), " ", r.scalar_type(), " does not fit x of ", x.sizes());
    const auto first = first_rows[j], end = first + r.size(0);
    TORCH_CHECK(first >= 0 && end <= x.size(0), "forecast: residual ", j, " covers rows ", first, " to ", end, " of ",
                x.size(0));
    r = r.contiguous();
    const auto size = r.size(0) ? r.numel() / r.size(0) : 0;
    for (auto row = first; row < end; ++row) {
      auto& own = terms[static_cast<std::size_t>(row)];
      TORCH_CHECK(own.count < kMaxTerms, "forecast: row ", row, " has more than ", kMaxTerms, " terms");
      own.residual[own.count] = r.const_data_ptr<at::BFloat16>() + (row - first) * size;
      own.weight[own.count++] = static_cast<float>(weights[j]);
    }
  }
  return terms;
}

at::Tensor forecast(const at::Tensor& x, at::TensorList residuals, at::ArrayRef<double> weights,
                    at::IntArrayRef first_rows) {
  const auto dense = x.contiguous();
  auto held = residuals.vec();  // contiguous ones, as long as they are read
  const auto rows = terms_by_row(dense, held, weights, first_rows);
  auto out = at::empty_like(dense);
  if (out.numel() == 0) return out;
  const auto size = dense.numel() / dense.size(0);
  const auto spans = (size + kSpan - 1) / kSpan;
  auto* to = out.mutable_data_ptr<at::BFloat16>();
  const auto* from = dense.const_data_ptr<at::BFloat16>();
  at::parallel_for(0, dense.size(0) * spans, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (auto span = begin; span < end; ++span) {
      const auto row = span / spans, offset = span % spans * kSpan, at = row * size + offset;
      forecast_span(to + at, from + at, rows[static_cast<std::size_t>(row)], offset, std::min(kSpan, size - offset));
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(vllm_omni, m) {
  m.def("forecast(Tensor x, Tensor[] residuals, float[] weights, int[] first_rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(vllm_omni, CPU, m) { m.impl("forecast", &forecast); }
