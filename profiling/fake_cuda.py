"""CUDA that is not there: enough of it to trace and lower code for a GPU on a machine without one, on fake tensors.

A CPU build of PyTorch knows the device `cuda` by name, but neither autograd nor Inductor take a tensor on it without a device guard and
the properties of a device. `fake_cuda` gives them both: a guard that does nothing, compiled from the C++ below, and the properties of an
H100. Nothing can run: an operator that computes raises.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using namespace c10;

struct FakeHooks final : at::CUDAHooksInterface {
  explicit FakeHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, getDevice()); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new Guard());
}  // namespace

namespace at {
using ::FakeHooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", FakeHooks)
}  // namespace at
"""

# What PyTorch says of an H100 (SXM), as far as Inductor asks.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 * 2**30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, L2_cache_size=50 * 2**20,
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10, shared_memory_per_multiprocessor=228 * 2**10,
)  # fmt: skip


# Shape functions that PyTorch lacks, of the fused LSTM cell on [B, 4 Dh] and [B, Dh] and of its backward pass.
_shapes = torch.library.Library("aten", "IMPL", "Meta")


def _lstm_cell(gates: Tensor, _: Tensor, cell: Tensor, *__: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(cell), torch.empty_like(cell), torch.empty_like(gates)


def _lstm_cell_backward(_: Tensor | None, __: Tensor | None, cell: Tensor, ___: Tensor, gates: Tensor, has_bias: bool) -> tuple:
    return torch.empty_like(gates), torch.empty_like(cell), gates.new_empty(gates.shape[1]) if has_bias else None


_shapes.impl("_thnn_fused_lstm_cell", _lstm_cell)
_shapes.impl("_thnn_fused_lstm_cell_backward_impl", _lstm_cell_backward)


def build(folder: str | Path) -> Path:
    """Compiles the guard into a folder: a library for `LD_PRELOAD`, since PyTorch asks once, at its import, whether there is CUDA."""
    from torch.utils.cpp_extension import include_paths, library_paths

    source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
    source.write_text(GUARD)
    paths = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    options = ["-std=c++20", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    options += [f"-I{path}" for path in include_paths()]
    subprocess.run(["g++", *options, source, "-o", library, *paths, "-lc10", "-ltorch_cpu"], check=True)
    return library


@contextlib.contextmanager
def present() -> Iterator[None]:
    """Within it, PyTorch, Inductor and Triton find the properties of an H100. Triton compiles for it and loads nothing."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, PROPERTIES.warp_size)
    limits = {"max_shared_mem": PROPERTIES.shared_memory_per_block_optin, "multiprocessor_count": PROPERTIES.multi_processor_count}
    utils = SimpleNamespace(get_device_properties=lambda _: limits)
    # Stays: no other driver can be active here.
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, utils=utils))

    def properties(*_: Any) -> SimpleNamespace:
        return PROPERTIES

    def first(*_: Any) -> int:
        return 0

    def yes(*_: Any, **__: Any) -> bool:
        return True

    def nothing(*_: Any) -> None:
        pass

    replaced = [
        (torch.version, "cuda", "13.0"),
        (torch._C, "_cuda_getCurrentRawStream", first),
        (torch.cuda, "current_device", first),
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_capability", lambda *_: (PROPERTIES.major, PROPERTIES.minor)),
        (torch.cuda, "is_bf16_supported", yes),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (CudaInterface, "is_available", yes),
        (CudaInterface, "is_bf16_supported", yes),
        (CudaInterface, "current_device", first),
        (CudaInterface, "get_device_properties", properties),
        (CudaInterface.Worker, "get_device_properties", properties),
        (triton_helpers, "set_driver_to_gpu", nothing),
        (CachingAutotuner, "_make_launchers", nothing),
        (CachingAutotuner, "_dynamic_scale_rblock", nothing),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield
