// The tensor operations that are ours, as plain functions on tensors. Shapes and meaning: vllm_omni/kernels/ops.py.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace vllm_omni {

constexpr int kMaxTerms = 8;  // of one row; predictors look at three anchors at most

// The terms that apply to one row of a batch: up to kMaxTerms residual rows and their weights.
struct RowTerms {
  const void* residual[kMaxTerms];
  float weight[kMaxTerms];
  int count;
};

// Checks the arguments of `forecast`, makes `residuals` contiguous, and lists the terms of every row of `x`.
std::vector<RowTerms> terms_by_row(const at::Tensor& x, std::vector<at::Tensor>& residuals,
                                   const std::vector<double>& weights, const std::vector<std::int64_t>& first_rows);

at::Tensor forecast_cpu(const at::Tensor& x, at::TensorList residuals, at::ArrayRef<double> weights,
                        at::IntArrayRef first_rows);
std::tuple<at::Tensor, at::Tensor> residual_norm_cpu(const at::Tensor& after, const at::Tensor& before,
                                                     at::ScalarType dtype);

at::Tensor forecast_cuda(const at::Tensor& x, at::TensorList residuals, at::ArrayRef<double> weights,
                         at::IntArrayRef first_rows);
std::tuple<at::Tensor, at::Tensor> residual_norm_cuda(const at::Tensor& after, const at::Tensor& before,
                                                      at::ScalarType dtype);

}  // namespace vllm_omni
