// One pass over memory, fp32 in registers, one rounding at the end. The inner loops are plain C++ that the compiler
// vectorises, once per instruction set; the machine that runs picks.
#include "ops.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_X86 __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_X86
#endif

namespace vllm_omni {
namespace {

constexpr std::int64_t kSpan = 1024;  // elements whose fp32 sums stay in the first-level cache
constexpr std::int64_t kGrain = 16 * kSpan;

// Conversions that vectorise: c10's own branch on NaN, element by element.
inline float load(const float* p) { return *p; }
inline void store(float* p, float v) { *p = v; }

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

#ifdef __FLT16_MAX__
inline float load(const at::Half* p) { return static_cast<float>(*reinterpret_cast<const _Float16*>(p)); }
inline void store(at::Half* p, float v) { *reinterpret_cast<_Float16*>(p) = static_cast<_Float16>(v); }
#else
inline float load(const at::Half* p) { return static_cast<float>(*p); }
inline void store(at::Half* p, float v) { *p = static_cast<at::Half>(v); }
#endif

// Written once per type by macro: target_clones does not take templates.
#define FORECAST_SPAN(X, R)                                                                                    \
  EVERY_X86 void forecast_span(X* out, const X* x, const R* const* r, const float* w, int terms, std::int64_t n) { \
    float sum[kSpan];                                                                                          \
    for (std::int64_t i = 0; i < n; ++i) sum[i] = load(x + i);                                                 \
    for (int j = 0; j < terms; ++j) {                                                                          \
      const R* rj = r[j];                                                                                      \
      const float wj = w[j];                                                                                   \
      for (std::int64_t i = 0; i < n; ++i) sum[i] += wj * load(rj + i);                                        \
    }                                                                                                          \
    for (std::int64_t i = 0; i < n; ++i) store(out + i, sum[i]);                                               \
  }
FORECAST_SPAN(float, float)
FORECAST_SPAN(float, at::BFloat16)
FORECAST_SPAN(float, at::Half)
FORECAST_SPAN(at::BFloat16, float)
FORECAST_SPAN(at::BFloat16, at::BFloat16)
FORECAST_SPAN(at::BFloat16, at::Half)
FORECAST_SPAN(at::Half, float)
FORECAST_SPAN(at::Half, at::BFloat16)
FORECAST_SPAN(at::Half, at::Half)

#define RESIDUAL_TOKEN(X, R)                                                                         \
  EVERY_X86 float residual_token(R* out, const X* after, const X* before, std::int64_t n) {          \
    constexpr int kLanes = 32;                                                                       \
    float squares[kLanes] = {};                                                                      \
    std::int64_t i = 0;                                                                              \
    for (; i + kLanes <= n; i += kLanes) {                                                           \
      for (int lane = 0; lane < kLanes; ++lane) {                                                    \
        const float d = load(after + i + lane) - load(before + i + lane);                            \
        store(out + i + lane, d);                                                                    \
        squares[lane] += d * d;                                                                      \
      }                                                                                              \
    }                                                                                                \
    for (; i < n; ++i) {                                                                             \
      const float d = load(after + i) - load(before + i);                                            \
      store(out + i, d);                                                                             \
      squares[0] += d * d;                                                                           \
    }                                                                                                \
    float total = 0;                                                                                 \
    for (int lane = 0; lane < kLanes; ++lane) total += squares[lane];                                \
    return std::sqrt(total);                                                                         \
  }
RESIDUAL_TOKEN(float, float)
RESIDUAL_TOKEN(float, at::BFloat16)
RESIDUAL_TOKEN(float, at::Half)
RESIDUAL_TOKEN(at::BFloat16, float)
RESIDUAL_TOKEN(at::BFloat16, at::BFloat16)
RESIDUAL_TOKEN(at::BFloat16, at::Half)
RESIDUAL_TOKEN(at::Half, float)
RESIDUAL_TOKEN(at::Half, at::BFloat16)
RESIDUAL_TOKEN(at::Half, at::Half)

#define DISPATCH(TYPE, NAME, ALIAS, ...)                                                                \
  AT_DISPATCH_SWITCH(TYPE, NAME,                                                                        \
                     AT_PRIVATE_CASE_TYPE_USING_HINT(at::ScalarType::Float, ALIAS, __VA_ARGS__)         \
                         AT_PRIVATE_CASE_TYPE_USING_HINT(at::ScalarType::BFloat16, ALIAS, __VA_ARGS__)  \
                             AT_PRIVATE_CASE_TYPE_USING_HINT(at::ScalarType::Half, ALIAS, __VA_ARGS__))

template <typename X, typename R>
void forecast_rows(at::Tensor& out, const at::Tensor& x, const std::vector<RowTerms>& rows) {
  const auto size = x.numel() / x.size(0);
  const auto spans = (size + kSpan - 1) / kSpan;
  auto* to = out.mutable_data_ptr<X>();
  const auto* from = x.const_data_ptr<X>();
  at::parallel_for(0, x.size(0) * spans, kGrain / kSpan, [&](std::int64_t begin, std::int64_t end) {
    for (auto span = begin; span < end; ++span) {
      const auto row = span / spans, offset = span % spans * kSpan;
      const auto& terms = rows[static_cast<std::size_t>(row)];
      const R* residual[kMaxTerms];
      for (int j = 0; j < terms.count; ++j) residual[j] = static_cast<const R*>(terms.residual[j]) + offset;
      const auto at = row * size + offset;
      forecast_span(to + at, from + at, residual, terms.weight, terms.count, std::min(kSpan, size - offset));
    }
  });
}

}  // namespace

at::Tensor forecast_cpu(const at::Tensor& x, at::TensorList residuals, at::ArrayRef<double> weights,
                        at::IntArrayRef first_rows) {
  const auto dense = x.contiguous();
  auto held = residuals.vec();
  const auto rows = terms_by_row(dense, held, weights.vec(), first_rows.vec());
  auto out = at::empty_like(dense);
  if (out.numel() == 0) return out;
  const auto kept = held.empty() ? x.scalar_type() : held[0].scalar_type();
  DISPATCH(x.scalar_type(), "forecast", x_t, [&] {
    DISPATCH(kept, "forecast", r_t, [&] { forecast_rows<x_t, r_t>(out, dense, rows); });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> residual_norm_cpu(const at::Tensor& after, const at::Tensor& before,
                                                     at::ScalarType dtype) {
  TORCH_CHECK(after.dim() == 3 && after.sizes() == before.sizes() && after.scalar_type() == before.scalar_type(),
              "residual_norm: ", after.sizes(), " ", after.scalar_type(), " and ", before.sizes(), " ",
              before.scalar_type(), " must be alike, (rows, tokens, channels)");
  const auto a = after.stride(2) == 1 ? after : after.contiguous();
  const auto b = before.stride(2) == 1 ? before : before.contiguous();
  const auto tokens = a.size(1), channels = a.size(2);
  auto out = at::empty(a.sizes(), a.options().dtype(dtype));
  auto norm = at::empty({a.size(0), tokens}, a.options().dtype(at::kFloat));
  if (out.numel() == 0) return {out, norm.zero_()};
  DISPATCH(a.scalar_type(), "residual_norm", x_t, [&] {
    DISPATCH(dtype, "residual_norm", r_t, [&] {
      const auto* pa = a.const_data_ptr<x_t>();
      const auto* pb = b.const_data_ptr<x_t>();
      auto* po = out.mutable_data_ptr<r_t>();
      auto* pn = norm.mutable_data_ptr<float>();
      at::parallel_for(0, a.size(0) * tokens, std::max<std::int64_t>(1, kGrain / channels),
                       [&](std::int64_t begin, std::int64_t end) {
                         for (auto i = begin; i < end; ++i) {
                           const auto row = i / tokens, token = i % tokens;
                           pn[i] = residual_token(po + i * channels, pa + row * a.stride(0) + token * a.stride(1),
                                                  pb + row * b.stride(0) + token * b.stride(1), channels);
                         }
                       });
    });
  });
  return {out, norm};
}

}  // namespace vllm_omni
