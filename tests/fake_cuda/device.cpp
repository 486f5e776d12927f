// A device of the CUDA dispatch key whose memory is the host's. Kernels are not here: dispatch.py runs the CPU's on a
// host view of the same memory. What is here cannot be done from Python: the device guard, storages that belong to a
// device, their accounting, and views that share them.
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <atomic>

namespace {

using c10::DeviceIndex;
constexpr int kDevices = 2;

struct Memory {
  std::atomic<int64_t> used{0};
  std::atomic<int64_t> peak{0};
  std::atomic<int64_t> limit{0};  // 0: none
};

std::array<Memory, kDevices> memory;
std::atomic<int64_t> streams_made{0};
thread_local DeviceIndex device_now = 0;
thread_local std::array<c10::StreamId, kDevices> streams_now{};

// Order of execution is the host's, so streams and events have nothing to do; dispatch.py has a clock for time.
class FakeGuard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return c10::Device(c10::kCUDA, device_now); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) device_now = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return stream(device, streams_now.at(device.index())); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(device, ++streams_made); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return stream(device, ++streams_made); }
  c10::Stream exchangeStream(c10::Stream wanted) const override {
    const c10::Stream before = getStream(wanted.device());
    streams_now.at(wanted.device_index()) = wanted.id();
    return before;
  }
  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override { *event = &memory; }
  void block(void*, const c10::Stream&) const override {}
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

 private:
  static c10::Stream stream(c10::Device device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, device, id);
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)

// Behind a device's storage: the host tensor that owns the bytes.
struct Block {
  at::Tensor bytes;
  int64_t size;
  DeviceIndex device;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  memory.at(block->device).used -= block->size;
  delete block;
}

// Behind a host view's storage: the device's tensor, so that its memory lives as long as the view.
struct Loan {
  at::Tensor lender;
};

void end_loan(void* context) { delete static_cast<Loan*>(context); }

c10::Storage device_storage(const at::Tensor& host, c10::Device device) {
  Memory& there = memory.at(device.index());
  const auto size = static_cast<int64_t>(host.storage().nbytes());
  const int64_t limit = there.limit, used = there.used;
  TORCH_CHECK_WITH(OutOfMemoryError, limit == 0 || used + size <= limit, "CUDA out of memory. Tried to allocate ", size,
                   " bytes on the fake ", device, ", which has ", limit, " of which ", used, " are in use");
  there.used += size;
  there.peak = std::max<int64_t>(there.peak, used + size);
  c10::DataPtr pointer(host.storage().mutable_data(), new Block{host, size, device.index()}, &free_block, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), size, std::move(pointer), c10::GetCPUAllocator(), true);
}

at::Tensor shaped(at::Tensor made, const at::Tensor& like) {
  auto* implementation = made.unsafeGetTensorImpl();
  implementation->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) implementation->set_wrapped_number(true);
  if (made.is_complex()) made._set_conj(like.is_conj());
  made._set_neg(like.is_neg());
  return made;
}

at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  return shaped(at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype()), like);
}

// A view is what its base is, also in inference mode: with a version of its own, or without.
at::Tensor view_of(const at::Tensor& base, const at::Tensor& like) {
  c10::Storage storage = base.storage();
  return shaped(at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(storage), base.key_set(), like.dtype()), like);
}

// A CPU tensor over the memory of a device's.
at::Tensor host_view(const at::Tensor& tensor) {
  const c10::Storage& lent = tensor.storage();
  c10::DataPtr pointer(lent.mutable_data(), new Loan{tensor}, &end_loan, c10::Device(c10::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), lent.nbytes(), std::move(pointer), c10::GetCPUAllocator(), true);
  return over(std::move(storage), c10::DispatchKey::CPU, tensor);
}

// What a CPU kernel returned, as a tensor of the device: a view if it is one of lent memory, else in a block of its own.
at::Tensor to_device(const at::Tensor& host, int64_t index) {
  const c10::DataPtr& pointer = host.storage().data_ptr();
  if (pointer.get_deleter() == &end_loan)
    return view_of(static_cast<Loan*>(pointer.get_context())->lender, host);
  const c10::Device device(c10::kCUDA, index < 0 ? device_now : static_cast<DeviceIndex>(index));
  return over(device_storage(host, device), c10::DispatchKey::CUDA, host);
}

// Let a tensor be what its host view has become: a kernel may give an output another size or other memory.
void follow(const at::Tensor& tensor, const at::Tensor& view) {
  auto* implementation = tensor.unsafeGetTensorImpl();
  const bool moved = view.storage().data() != tensor.storage().data() || view.storage().nbytes() != tensor.storage().nbytes();
  if (moved) implementation->set_storage_keep_dtype(device_storage(view, tensor.device()));
  implementation->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
}

}  // namespace

TORCH_LIBRARY(fake_cuda, library) {
  library.def("host_view(Tensor tensor) -> Tensor", &host_view);
  library.def("to_device(Tensor host, int index) -> Tensor", &to_device);
  library.def("follow(Tensor tensor, Tensor view) -> ()", &follow);
}

extern "C" {
int fake_cuda_current() { return device_now; }
void fake_cuda_set_current(int index) { device_now = static_cast<DeviceIndex>(index); }
int64_t fake_cuda_used(int index) { return memory.at(index).used; }
int64_t fake_cuda_peak(int index) { return memory.at(index).peak; }
void fake_cuda_reset_peak(int index) { memory.at(index).peak = memory.at(index).used.load(); }
void fake_cuda_limit(int index, int64_t bytes) { memory.at(index).limit = bytes; }
}
