// Schemas, argument checks, and registration. One TORCH_LIBRARY; the device decides which implementation runs.
#include "ops.h"

#include <torch/library.h>

namespace vllm_omni {

std::vector<RowTerms> terms_by_row(const at::Tensor& x, std::vector<at::Tensor>& residuals,
                                   const std::vector<double>& weights, const std::vector<std::int64_t>& first_rows) {
  TORCH_CHECK(x.dim() >= 2, "forecast: x must have rows, got ", x.dim(), " dimension(s)");
  TORCH_CHECK(residuals.size() == weights.size() && residuals.size() == first_rows.size(),
              "forecast: ", residuals.size(), " residuals, ", weights.size(), " weights and ", first_rows.size(),
              " first rows must be as many");
  const auto rows = x.size(0);
  std::vector<RowTerms> terms(static_cast<std::size_t>(rows));
  for (auto& row : terms) row.count = 0;
  for (std::size_t j = 0; j < residuals.size(); ++j) {
    auto& r = residuals[j];
    TORCH_CHECK(r.device() == x.device() && r.scalar_type() == residuals[0].scalar_type() && r.dim() == x.dim() &&
                    r.sizes().slice(1) == x.sizes().slice(1),
                "forecast: residual ", j, " of ", r.sizes(), " ", r.scalar_type(), " does not fit x of ", x.sizes());
    const auto first = first_rows[j], end = first + r.size(0);
    TORCH_CHECK(first >= 0 && end <= rows, "forecast: residual ", j, " covers rows ", first, " to ", end, " of ", rows);
    r = r.contiguous();
    const auto bytes = r.numel() / std::max<std::int64_t>(r.size(0), 1) * r.element_size();
    for (auto row = first; row < end; ++row) {
      auto& own = terms[static_cast<std::size_t>(row)];
      TORCH_CHECK(own.count < kMaxTerms, "forecast: row ", row, " has more than ", kMaxTerms, " terms");
      own.residual[own.count] = static_cast<const char*>(r.const_data_ptr()) + (row - first) * bytes;
      own.weight[own.count++] = static_cast<float>(weights[j]);
    }
  }
  return terms;
}

}  // namespace vllm_omni

TORCH_LIBRARY(vllm_omni, m) {
  m.def("forecast(Tensor x, Tensor[] residuals, float[] weights, int[] first_rows) -> Tensor");
  m.def("residual_norm(Tensor after, Tensor before, ScalarType dtype) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vllm_omni, CPU, m) {
  m.impl("forecast", &vllm_omni::forecast_cpu);
  m.impl("residual_norm", &vllm_omni::residual_norm_cpu);
}

#ifdef VLLM_OMNI_WITH_CUDA
TORCH_LIBRARY_IMPL(vllm_omni, CUDA, m) {
  m.impl("forecast", &vllm_omni::forecast_cuda);
  m.impl("residual_norm", &vllm_omni::residual_norm_cuda);
}
#endif
