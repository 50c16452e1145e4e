// Two devices under CUDA's name whose memory is the host's: every operation runs on the CPU, on tensors that share the
// memory. What holds for CUDA's tensors holds for these: with those of another device they do not mix, they are copied
// to and from it only where somebody says so, and they come out of a memory that is counted and can have a limit.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <set>

namespace {
using at::Tensor;
using c10::IValue;

const c10::Device CPU(c10::kCPU);
thread_local c10::Device current(c10::kCUDA, 0);

std::atomic<int64_t> used{0}, peak{0}, limit{INT64_MAX};

// Memory that counts as a device's until it is freed.
struct Counted {
  explicit Counted(size_t size) : size(int64_t(size)) {
    const int64_t now = used += this->size;
    if (now > limit) used -= this->size;
    TORCH_CHECK_WITH(OutOfMemoryError, now <= limit, "CUDA out of memory. Tried to allocate ", size, " bytes.");
    for (int64_t before = peak; now > before && !peak.compare_exchange_weak(before, now);) {
    }
  }
  ~Counted() { used -= size; }

  int64_t size;
  c10::DataPtr memory;
};

c10::DataPtr owned(std::unique_ptr<Counted> counted, c10::Device device) {
  void* data = counted->memory.get();
  return {data, counted.release(), [](void* given) { delete static_cast<Counted*>(given); }, device};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto counted = std::make_unique<Counted>(size);
    counted->memory = c10::GetAllocator(c10::kCPU)->allocate(size);
    return owned(std::move(counted), current);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
} memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    std::swap(current, device);
    return device;
  }
  c10::Device getDevice() const override { return current; }
  void setDevice(c10::Device device) const override { current = device; }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device; }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// The same memory as a tensor of another device; `fresh`: it counts as the device's from now on.
Tensor alias(const Tensor& tensor, c10::Device device, bool fresh = false) {
  const size_t size = tensor.storage().nbytes();
  auto* holder = new c10::Storage(tensor.storage());
  const auto free = [](void* holder) { delete static_cast<c10::Storage*>(holder); };
  c10::DataPtr data(holder->mutable_data(), holder, free, device);
  if (fresh) {
    auto counted = std::make_unique<Counted>(size);
    counted->memory = std::move(data);
    data = owned(std::move(counted), device);
  }
  auto* allocator = device.is_cuda() ? &memory : c10::GetAllocator(c10::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), size, std::move(data), allocator, /*resizable=*/true);
  const c10::DispatchKeySet keys(device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return result;
}

// The tensors of the device that one operation was given, as the CPU sees them.
class Given {
 public:
  // For the CPU, of whose tensors those of one item go with everything.
  Tensor lower(const Tensor& tensor, bool written) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      host_ |= tensor.dim() > 0;
      return tensor;
    }
    meet(tensor.device());
    for (auto& [own, cpu, changes] : tensors_)
      if (own.is_same(tensor)) {
        changes |= written;
        return cpu;
      }
    tensors_.push_back({tensor, alias(tensor, CPU), written});
    return tensors_.back().cpu;
  }

  IValue lower(const IValue& value, bool written) {
    if (value.isTensor()) return lower(value.toTensor(), written);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(lower(tensor, written));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? std::optional<Tensor>(lower(*tensor, written)) : std::nullopt);
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      meet(value.toDevice());
      return CPU;
    }
    return value;
  }

  IValue raise(const IValue& value) const {
    if (!device_) return value;
    if (value.isTensor()) return raise(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(raise(tensor));
    return list;
  }

  // Makes those that were written to what they are on the CPU, where they may have become larger.
  void update() {
    for (auto& [own, cpu, changed] : tensors_) {
      const bool moved = cpu.storage().data() != own.storage().data();
      if (!changed || (!moved && cpu.sizes() == own.sizes() && cpu.strides() == own.strides())) continue;
      auto* impl = own.unsafeGetTensorImpl();
      impl->set_storage_keep_dtype(alias(cpu, own.device(), moved).storage());
      impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

  void check(const std::string& name) const {
    const auto other = host_ && device_ ? std::optional(CPU) : other_;
    TORCH_CHECK(!other, "Expected all tensors to be on the same device, but found at least two devices, ", *device_,
                " and ", *other, "! (", name, ")");
  }

 private:
  struct Pair {
    Tensor own, cpu;
    bool changes;
  };

  void meet(c10::Device device) {
    if (!device.has_index()) device = current;
    if (device_ && *device_ != device) other_ = device;
    if (!device_) device_ = device;
  }

  Tensor raise(const Tensor& tensor) const {
    if (!tensor.defined()) return tensor;
    bool shared = false;
    for (const auto& [own, cpu, changes] : tensors_) {
      if (cpu.is_same(tensor)) return own;
      shared |= tensor.storage().data() == cpu.storage().data();
    }
    return alias(tensor, *device_, !shared);
  }

  std::vector<Pair> tensors_;
  std::optional<c10::Device> device_, other_;
  bool host_ = false;
};

const std::set<std::string> BY_INDICES = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"};

void operation(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = c10::toString(op.operator_name());
  const size_t first = stack->size() - schema.arguments().size();
  const bool indices = BY_INDICES.count(name) && (*stack)[first].toTensor().is_cuda();  // which may be the CPU's
  Given given;
  for (size_t i = 0; first + i < stack->size(); ++i) {
    const auto* info = schema.arguments()[i].alias_info();
    (*stack)[first + i] = given.lower((*stack)[first + i], info && info->isWrite());
  }
  if (!indices) given.check(name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  given.update();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = given.raise((*stack)[i]);
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(*device);
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

// The CPU's, which cannot pin memory without CUDA's driver.
Tensor unpinned(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_cpu(size, c10::dtype_or_default(dtype), /*pin_memory=*/false, format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(*device);
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool) {
  (to.is_cuda() ? alias(to, CPU) : to).copy_(from.is_cuda() ? alias(from, CPU) : from);
  return to;
}

Tensor& set_(Tensor& tensor, at::Storage source) {
  const auto count = int64_t(source.nbytes() / tensor.itemsize());
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(c10::IntArrayRef({count}), c10::IntArrayRef({1}), 0);
  return tensor;
}

// Gives the memory of a tensor another size, as a storage's resize_ does.
void resize(const Tensor& tensor, int64_t size) {
  const c10::DeviceGuard guard(tensor.device());
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  auto data = memory.allocate(size_t(size));
  std::memcpy(data.get(), storage->mutable_data(), std::min(size_t(size), storage->nbytes()));
  storage->set_data_ptr_noswap(std::move(data));
  storage->set_nbytes(size_t(size));
}

// Convolutions choose between CUDA's own libraries before they come to an operation that the CPU has, too.
const std::set<std::string> WHOLE = {"aten::convolution"};
const std::set<std::string> OWN = {"aten::empty.memory_format", "aten::empty_strided",      "aten::copy_",
                                   "aten::set_.source_Storage", "aten::view",               "aten::as_strided",
                                   "aten::_reshape_alias"};
std::vector<c10::RegistrationHandleRAII> registered;

// In the place of CUDA's kernels, which a build of torch for CUDA has, those of the CPU.
void replace() {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto found = dispatcher.findOp(name);
    const bool both = found && found->hasSchema() && found->hasKernelForDispatchKey(c10::DispatchKey::CUDA) &&
                      found->hasKernelForDispatchKey(c10::DispatchKey::CPU);
    if (OWN.count(c10::toString(name)) || !(both || WHOLE.count(c10::toString(name)))) continue;
    auto kernel = c10::KernelFunction::makeFromBoxedFunction<&operation>();
    registered.push_back(
        dispatcher.registerImpl(name, c10::DispatchKey::CUDA, std::move(kernel), std::nullopt, nullptr, "stand-in"));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&operation>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  replace();
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy_);
  library.impl("set_.source_Storage", &set_);
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
}

TORCH_LIBRARY_IMPL(aten, CPU, library) { library.impl("empty.memory_format", &unpinned); }

TORCH_LIBRARY(standin, library) {
  c10::SetAllocator(c10::kCUDA, &memory, /*priority=*/1);
  library.def("resize(Tensor tensor, int size) -> ()", &resize);
  library.def("host(Tensor tensor) -> Tensor", [](const Tensor& tensor) { return alias(tensor, CPU); });
  library.def("set_device(Device device) -> ()", [](c10::Device device) { current = device; });
  library.def("current_device() -> int", [] { return int64_t(current.index()); });
  library.def("used() -> int", [] { return used.load(); });
  library.def("peak() -> int", [] { return peak.load(); });
  library.def("forget_peak() -> ()", [] { peak = used.load(); });
  library.def("set_limit(int size) -> ()", [](int64_t size) { limit = size; });
}
