// A CUDA device whose memory is the CPU's; see simulated.py.
//
// Tensors carry the device cuda:0 and a storage that any CPU tensor can share, so every operation runs as the CPU's on
// the same bytes (`fallback`). Only making, copying and resizing tensors is our own, and the few operations that CUDA
// has and a CPU has not. Only tensors count as memory, not what a kernel needs while it runs.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <atomic>
#include <set>

namespace {

using at::Device, at::IntArrayRef, at::Scalar, at::ScalarType, at::Tensor, c10::Storage;
using Maybe = std::optional<Tensor>;
const Device DEVICE(at::kCUDA, 0);

// -- the device: one, with one stream ---------------------------------------------------------------------

const c10::Stream ONLY(c10::Stream::DEFAULT, DEVICE);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return at::kCUDA; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const noexcept override { return ONLY; }
  c10::Stream getNewStream(Device, int) const override { return ONLY; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return ONLY; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

// torch asks for its hooks once, before this is loaded: the object it has gets our functions
const bool HOOKED = [] {
  static Hooks ours;
  auto& theirs = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&theirs) = *reinterpret_cast<void**>(&ours);
  return true;
}();

// -- memory -----------------------------------------------------------------------------------------------

std::atomic<int64_t> live{0}, peak{0}, limit{INT64_MAX};
std::atomic<bool> may_wait{true};

void charge(int64_t bytes) {
  int64_t now = live += bytes;
  if (now > limit) {
    live -= bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory (simulated): ", bytes, " bytes more");
  }
  if (now > peak) peak = now;
}

void wait(const std::string& what) {
  TORCH_CHECK(may_wait, "called a synchronizing CUDA operation (simulated): ", what);
}

struct Held {
  Storage storage;
  int64_t charged;
};

void release(void* held) {
  live -= static_cast<Held*>(held)->charged;
  delete static_cast<Held*>(held);
}

// the same bytes on another device, which keep the first storage alive
c10::DataPtr shared(const Storage& storage, Device device, int64_t charged) {
  return {storage.mutable_data(), new Held{storage, charged}, &release, device};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    charge(bytes);
    return shared(Storage({}, bytes, c10::GetCPUAllocator(), false), DEVICE, bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} allocator;
const bool ALLOCATES = (c10::SetAllocator(at::kCUDA, &allocator, 255), true);

Tensor view_of(Storage storage, c10::DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

Tensor to_host(const Tensor& x) {
  if (!x.defined() || !x.is_cuda()) return x;
  const auto& storage = x.storage();
  auto bytes = shared(storage, at::kCPU, 0);
  Storage own(Storage::use_byte_size_t{}, storage.nbytes(), std::move(bytes), c10::GetCPUAllocator(), true);
  return view_of(std::move(own), c10::DispatchKey::CPU, x);
}

Tensor to_device(const Tensor& x) {
  const auto& storage = x.storage();
  charge(storage.nbytes());
  auto bytes = shared(storage, DEVICE, storage.nbytes());
  Storage own(Storage::use_byte_size_t{}, storage.nbytes(), std::move(bytes), &allocator, true);
  return view_of(std::move(own), c10::DispatchKey::CUDA, x);
}

// -- every operation --------------------------------------------------------------------------------------

const std::set<std::string> READ_ON_THE_HOST{
    "aten::_local_scalar_dense", "aten::equal", "aten::masked_select", "aten::nonzero"};
const std::set<std::string> TAKE_TENSORS_OF_BOTH{"aten::_index_put_impl_", "aten::index", "aten::index_put_"};

template <class Function>
void replace_tensors(c10::IValue& value, const Function& by) {
  if (value.isTensor()) {
    value = by(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& x : list) x = by(x);
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<Maybe> list;
    for (const Maybe& x : value.toOptionalTensorVector()) list.push_back(x ? Maybe(by(*x)) : x);
    value = list;
  }
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  std::vector<std::pair<Tensor, Tensor>> seen;  // on the device, on the host
  bool has_host_tensor = false;
  auto in = [&](const Tensor& x) -> Tensor {
    if (!x.defined()) return x;
    if (!x.is_cuda()) {
      has_host_tensor |= x.dim() > 0;  // a single number may lie anywhere
      return x;
    }
    for (auto& [device, host] : seen)
      if (device.is_same(x)) return host;
    return seen.emplace_back(x, to_host(x)).second;
  };
  size_t first = stack->size() - op.schema().arguments().size();
  for (size_t i = first; i < stack->size(); i++) {
    replace_tensors((*stack)[i], in);
    if ((*stack)[i].isDevice()) (*stack)[i] = Device(at::kCPU);
  }
  TORCH_CHECK(seen.empty() || !has_host_tensor || TAKE_TENSORS_OF_BOTH.count(name), name,
              ": Expected all tensors to be on the same device, but found cuda:0 and cpu (simulated)");
  if (READ_ON_THE_HOST.count(name)) wait(name);

  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (auto& [device, host] : seen) {  // outputs that were made longer
    if (device.storage().data() == host.storage().data()) continue;
    device.resize_(host.sizes());
    to_host(device).copy_(host);
  }
  auto out = [&](const Tensor& x) -> Tensor {
    if (!x.defined() || x.is_cuda()) return x;
    for (auto& [device, host] : seen) {
      if (host.is_same(x)) return device;
      if (host.storage().is_alias_of(x.storage())) return view_of(device.storage(), c10::DispatchKey::CUDA, x);
    }
    return to_device(x);
  };
  first = stack->size() - op.schema().returns().size();
  for (size_t i = first; i < stack->size(); i++) replace_tensors((*stack)[i], out);
}

// -- making, copying and resizing -------------------------------------------------------------------------

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<c10::Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype));
}

Tensor& copy_into(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_cuda() != from.is_cuda() && !non_blocking) wait("aten::copy_");
  to_host(to).copy_(to_host(from));
  return to;
}

const Tensor& resize_in_place(const Tensor& x, IntArrayRef size, std::optional<c10::MemoryFormat>) {
  size_t bytes = (c10::multiply_integers(size) + x.storage_offset()) * x.element_size();
  if (x.storage().nbytes() < bytes) {
    c10::DataPtr longer = allocator.allocate(bytes);
    memcpy(longer.get(), x.storage().data(), x.storage().nbytes());
    auto storage = x.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(std::move(longer));
    storage->set_nbytes(bytes);
  }
  if (x.sizes() != size) x.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return x;
}

Tensor& set_storage(Tensor& x, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto tensor = x.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_storage_offset(offset);
  stride.empty() ? tensor->set_sizes_contiguous(size) : tensor->set_sizes_and_strides(size, stride);
  return x;
}

Tensor& set_whole_storage(Tensor& x, Storage storage) {
  int64_t count = storage.nbytes() / x.element_size();
  return set_storage(x, std::move(storage), 0, {count}, {});
}

Tensor& set_tensor(Tensor& x, const Tensor& from) {
  return set_storage(x, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

// -- what a CPU has not, or computes too slowly in 16 bits ------------------------------------------------

int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const Maybe&, double, bool, std::optional<double>,
                        bool) {
  return 0;  // SDPBackend.MATH
}

Tensor in_float(const Tensor& x, ScalarType type) {
  TORCH_CHECK(x.is_cuda() && x.scalar_type() == type, "factors on other devices or of other types (simulated)");
  return to_host(x).to(at::kFloat);
}

Tensor mm(const Tensor& a, const Tensor& b) {
  auto type = a.scalar_type();
  return to_device(at::mm(in_float(a, type), in_float(b, type)).to(type));
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  auto type = a.scalar_type();
  return to_device(at::bmm(in_float(a, type), in_float(b, type)).to(type));
}

Tensor addmm(const Tensor& c, const Tensor& a, const Tensor& b, const Scalar& beta, const Scalar& alpha) {
  auto type = a.scalar_type();
  return to_device(at::addmm(in_float(c, type), in_float(a, type), in_float(b, type), beta, alpha).to(type));
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, IntArrayRef, const Maybe& weight, std::optional<double> eps) {
  Tensor values = to_host(x).to(at::kFloat);
  Tensor scale = (values.square().mean(-1, true) + eps.value_or(0.0)).rsqrt();
  Tensor y = values * scale * to_host(*weight).to(at::kFloat);
  return {to_device(y.to(x.scalar_type())), to_device(scale)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& gradient, const Tensor& x, IntArrayRef, const Tensor& scale,
                                             const Maybe& weight, std::array<bool, 2>) {
  Tensor normed = to_host(x).to(at::kFloat) * to_host(scale);
  Tensor weighted = to_host(gradient).to(at::kFloat) * to_host(*weight).to(at::kFloat);
  Tensor of_x = (weighted - normed * (weighted * normed).mean(-1, true)) * to_host(scale);
  return {to_device(of_x.to(x.scalar_type())), Tensor()};
}

torch::CppFunction as_on_a_cpu() { return torch::CppFunction::makeFromBoxedFunction<&fallback>(); }

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(as_on_a_cpu()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", ::empty);
  m.impl("empty_strided", ::empty_strided);
  m.impl("copy_", copy_into);
  m.impl("resize_", resize_in_place);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("_fused_sdp_choice", plain_attention);
  m.impl("mm", ::mm);
  m.impl("bmm", ::bmm);
  m.impl("addmm", ::addmm);
  m.impl("_fused_rms_norm", ::rms_norm);
  m.impl("_fused_rms_norm_backward", rms_norm_backward);
  m.impl("silu_backward", as_on_a_cpu());  // in torch without CUDA it is made of others, which hold more
}

// bitsandbytes' own for devices it does not know are compiled by torch, anew for every shape
TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, m) {
  for (const char* name : {"dequantize_4bit", "dequantize_4bit.out", "dequantize_blockwise", "dequantize_blockwise.out",
                           "gemm_4bit", "quantize_4bit", "quantize_blockwise"})
    m.impl(name, as_on_a_cpu());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("live", [] { return live.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("reset_peak", [] { peak = live.load(); });
  m.def("set_limit", [](int64_t bytes) { limit = bytes; });
  m.def("set_may_wait", [](bool may) { return may_wait.exchange(may); });
}
