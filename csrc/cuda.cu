// The same two operations on a GPU: one thread per four elements for the forecast, one warp per token for the residual.
#include "ops.h"

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace vllm_omni {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

template <typename X, typename R>
__global__ void forecast_kernel(X* __restrict__ out, const X* __restrict__ x, const RowTerms* __restrict__ rows,
                                std::int64_t size) {
  const RowTerms& terms = rows[blockIdx.y];
  const std::int64_t base = blockIdx.y * size;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    float sum = static_cast<float>(x[base + i]);
    for (int j = 0; j < terms.count; ++j) {
      sum += terms.weight[j] * static_cast<float>(static_cast<const R*>(terms.residual[j])[i]);
    }
    out[base + i] = static_cast<X>(sum);
  }
}

template <typename X, typename R>
__global__ void residual_norm_kernel(R* __restrict__ out, float* __restrict__ norm, const X* __restrict__ after,
                                     const X* __restrict__ before, std::int64_t count, std::int64_t tokens,
                                     std::int64_t channels, std::int64_t after_row, std::int64_t after_token,
                                     std::int64_t before_row, std::int64_t before_token) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (i >= count) return;
  const std::int64_t row = i / tokens, token = i % tokens;
  const X* a = after + row * after_row + token * after_token;
  const X* b = before + row * before_row + token * before_token;
  float squares = 0;
  for (std::int64_t c = threadIdx.x % kWarp; c < channels; c += kWarp) {
    const float d = static_cast<float>(a[c]) - static_cast<float>(b[c]);
    out[i * channels + c] = static_cast<R>(d);
    squares += d * d;
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) squares += __shfl_down_sync(0xFFFFFFFFu, squares, lanes);
  if (threadIdx.x % kWarp == 0) norm[i] = sqrtf(squares);
}

}  // namespace

at::Tensor forecast_cuda(const at::Tensor& x, at::TensorList residuals, at::ArrayRef<double> weights,
                         at::IntArrayRef first_rows) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto dense = x.contiguous();
  auto held = residuals.vec();
  const auto rows = terms_by_row(dense, held, weights.vec(), first_rows.vec());
  auto out = at::empty_like(dense);
  if (out.numel() == 0) return out;
  // Pinned memory comes from torch's caching host allocator, which holds it until the copy is done: no wait here.
  const auto bytes = static_cast<std::int64_t>(rows.size() * sizeof(RowTerms));
  auto table = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  std::memcpy(table.mutable_data_ptr(), rows.data(), static_cast<std::size_t>(bytes));
  const auto on_device = table.to(x.device(), /*non_blocking=*/true);
  const auto size = dense.numel() / dense.size(0);
  const dim3 grid(static_cast<unsigned>(std::min<std::int64_t>((size + kThreads - 1) / kThreads, 4096)),
                  static_cast<unsigned>(dense.size(0)));
  const auto kept = held.empty() ? x.scalar_type() : held[0].scalar_type();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "forecast", [&] {
    using x_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, kept, "forecast", [&] {
      forecast_kernel<x_t, scalar_t><<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
          out.mutable_data_ptr<x_t>(), dense.const_data_ptr<x_t>(),
          static_cast<const RowTerms*>(on_device.const_data_ptr()), size);
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor> residual_norm_cuda(const at::Tensor& after, const at::Tensor& before,
                                                      at::ScalarType dtype) {
  TORCH_CHECK(after.dim() == 3 && after.sizes() == before.sizes() && after.scalar_type() == before.scalar_type(),
              "residual_norm: ", after.sizes(), " and ", before.sizes(), " must be alike, (rows, tokens, channels)");
  const c10::cuda::CUDAGuard guard(after.device());
  const auto a = after.stride(2) == 1 ? after : after.contiguous();
  const auto b = before.stride(2) == 1 ? before : before.contiguous();
  const auto count = a.size(0) * a.size(1);
  auto out = at::empty(a.sizes(), a.options().dtype(dtype));
  auto norm = at::empty({a.size(0), a.size(1)}, a.options().dtype(at::kFloat));
  if (out.numel() == 0) return {out, norm.zero_()};
  const auto blocks = static_cast<unsigned>((count + kThreads / kWarp - 1) / (kThreads / kWarp));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.scalar_type(), "residual_norm", [&] {
    using x_t = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "residual_norm", [&] {
      residual_norm_kernel<x_t, scalar_t><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
          out.mutable_data_ptr<scalar_t>(), norm.mutable_data_ptr<float>(), a.const_data_ptr<x_t>(),
          b.const_data_ptr<x_t>(), count, a.size(1), a.size(2), a.stride(0), a.stride(1), b.stride(0), b.stride(1));
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, norm};
}

}  // namespace vllm_omni
