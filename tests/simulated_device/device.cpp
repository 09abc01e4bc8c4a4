// Two devices in host memory for tests of what moves between devices, on machines that have none.
//
// They are PyTorch's PrivateUse1 backend. As on a real device, an address of theirs cannot be read from outside (it lies in a page
// without access: the bytes are SHIFT further on), tensors of two devices do not mix in one operation, and what is allocated is
// counted. Operators run on copies in ordinary memory.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <array>
#include <atomic>

namespace {

constexpr c10::DeviceIndex DEVICES = 2;
constexpr size_t PAGE = 4096, SHIFT = size_t{1} << 40;

struct Memory {
    std::atomic<int64_t> used{0}, peak{0};
};
std::array<Memory, DEVICES> memory;
thread_local c10::DeviceIndex current = 0;

void check_index(c10::DeviceIndex index) {
    TORCH_CHECK(index < DEVICES, "there are ", int(DEVICES), " simulated devices, no number ", int(index));
}

size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// -- memory ---------------------------------------------------------------------------------------------------------------------

struct Block {
    char* address;
    size_t bytes;
    c10::DeviceIndex device;
};

char* space() {  // addresses of devices, then, SHIFT further on, their memory
    static char* start = [] {
        void* found = mmap(nullptr, 2 * SHIFT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        TORCH_CHECK(found != MAP_FAILED, "no address space for the simulated devices");
        return static_cast<char*>(found);
    }();
    return start;
}

void release(void* context) {
    auto* block = static_cast<Block*>(context);
    mmap(block->address + SHIFT, pages(block->bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    memory[block->device].used -= int64_t(block->bytes);
    delete block;
}

struct DeviceAllocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        static std::atomic<size_t> next{0};  // an address is never given out twice: use after free is a crash
        const c10::Device device(c10::kPrivateUse1, current);
        if (bytes == 0) return {nullptr, device};
        const size_t offset = next.fetch_add(pages(bytes));
        TORCH_CHECK(offset + pages(bytes) <= SHIFT, "the simulated devices are out of addresses");
        auto* block = new Block{space() + offset, bytes, current};
        void* real = mmap(block->address + SHIFT, pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        TORCH_CHECK(real != MAP_FAILED, "the simulated device is out of memory");
        auto& counted = memory[current];
        const int64_t used = counted.used += int64_t(bytes);
        if (used > counted.peak) counted.peak = used;
        return {block->address, block, &release, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void* to, const void* from, size_t bytes) const override {
        std::memcpy(static_cast<char*>(to) + SHIFT, static_cast<const char*>(from) + SHIFT, bytes);
    }
};
DeviceAllocator allocator;
REGISTER_ALLOCATOR(c10::kPrivateUse1, &allocator)

// -- devices --------------------------------------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::kPrivateUse1; }
    c10::Device getDevice() const override { return {c10::kPrivateUse1, current}; }
    c10::Device exchangeDevice(c10::Device device) const override {
        const auto before = getDevice();
        setDevice(device);
        return before;
    }
    void setDevice(c10::Device device) const override {
        check_index(device.index());
        uncheckedSetDevice(device);
    }
    void uncheckedSetDevice(c10::Device device) const noexcept override {
        if (device.has_index()) current = device.index();
    }
    c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
    c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
    c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
    c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override {}
    void synchronizeDevice(c10::DeviceIndex) const override {}
    // Events: all work is done when it is called.
    void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return DEVICES; }
    c10::DeviceIndex getCurrentDevice() const override { return current; }
    void setCurrentDevice(c10::DeviceIndex index) const override { Guard().setDevice({c10::kPrivateUse1, index}); }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
        return Guard().exchangeDevice({c10::kPrivateUse1, index}).index();
    }
    c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
        const c10::DeviceGuard guard(storage.device());
        auto fresh = allocator.allocate(bytes);
        if (const size_t kept = std::min(bytes, storage.nbytes())) allocator.copy_data(fresh.get(), storage.data(), kept);
        storage.set_data_ptr_noswap(std::move(fresh));
        storage.set_nbytes(bytes);
    }
};

// -- operators ------------------------------------------------------------------------------------------------------------------

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
    const c10::DeviceGuard guard(c10::device_or_default(device));
    return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
    const c10::DeviceGuard guard(c10::device_or_default(device));
    return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, c10::dtype_or_default(dtype));
}

// The same elements as a tensor in ordinary memory.
at::Tensor host(const at::Tensor& tensor) {
    if (tensor.is_cpu()) return tensor;
    const auto options = tensor.options().device(at::kCPU);
    if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
    auto plain = at::from_blob(static_cast<char*>(tensor.data_ptr()) + SHIFT, tensor.sizes(), tensor.strides(), options);
    if (tensor.is_conj()) plain._set_conj(true);
    if (tensor.is_neg()) plain._set_neg(true);
    return plain;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
    host(to).copy_(host(from));
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
    to.resize_(from.sizes());
    return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) { return host(tensor).item(); }

at::Tensor strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
    auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
    return view;
}

at::Tensor view(const at::Tensor& self, at::IntArrayRef size) {
    const auto shape = at::infer_size_dv(size, self.numel());
    const auto stride = at::detail::computeStride(self.sizes(), self.strides(), shape);
    TORCH_CHECK(stride.has_value(), "view size is not compatible with the tensor's size and stride; use reshape");
    return strided(self, shape, *stride, self.storage_offset());
}

at::Tensor reshape_alias(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
    return strided(self, size, stride, self.storage_offset());
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
    return at::native::resize_(self, size, format);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
    auto* impl = self.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(std::move(source));
    impl->set_storage_offset(offset);
    if (stride.data() == nullptr) impl->set_sizes_contiguous(size); else impl->set_sizes_and_strides(size, stride);
    return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
    const auto elements = int64_t(source.nbytes() / self.dtype().itemsize());
    return set_storage(self, std::move(source), 0, {elements}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
    return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

int64_t attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
                  std::optional<double>, bool) {
    return 0;  // the plain one
}

// Everything else runs on copies in ordinary memory. Operands of two devices are refused, as they are on GPUs.
void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    std::optional<c10::Device> device;
    const auto check = [&](const at::Tensor& tensor) {
        if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) return;
        TORCH_CHECK(!device || *device == tensor.device(), "Expected all tensors to be on the same device, but found at least two devices, ",
                    *device, " and ", tensor.device(), "! (", op.schema().operator_name(), ")");
        device = tensor.device();
    };
    for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
        if (value.isTensor()) check(value.toTensor());
        if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorList()) check(tensor);
    }
    at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("_local_scalar_dense", item);
    m.impl("as_strided", strided);
    m.impl("view", view);
    m.impl("_reshape_alias", reshape_alias);
    m.impl("resize_", resize);
    m.impl("set_.source_Storage_storage_offset", set_storage);
    m.impl("set_.source_Storage", set_whole_storage);
    m.impl("set_.source_Tensor", set_tensor);
    m.impl("_fused_sdp_choice", attention);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY(simulated_device, m) {
    m.def("start() -> ()", [] {
        if (!at::isPrivateUse1HooksRegistered()) at::RegisterPrivateUse1HooksInterface(new Hooks);
    });
    m.def("device_count() -> int", [] { return int64_t(DEVICES); });
    m.def("current_device() -> int", [] { return int64_t(current); });
    m.def("set_device(int index) -> ()", [](int64_t index) { Guard().setDevice({c10::kPrivateUse1, c10::DeviceIndex(index)}); });
    m.def("memory_allocated(int index) -> int", [](int64_t index) { return int64_t(memory.at(index).used); });
    m.def("max_memory_allocated(int index) -> int", [](int64_t index) { return int64_t(memory.at(index).peak); });
    m.def("reset_peak_memory_stats(int index) -> ()", [](int64_t index) { memory.at(index).peak = int64_t(memory.at(index).used); });
}

}  // namespace
