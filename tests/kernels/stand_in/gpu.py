"""Make Triton see a GPU of compute capability FAKE_CC behind the stand-in libcuda in STUB_DIR. Import it first."""

import ctypes
import os

_FOLDER = os.environ["STUB_DIR"]
CAPABILITY = divmod(int(os.environ["FAKE_CC"]), 10)
os.environ["TRITON_LIBCUDA_PATH"] = _FOLDER
_library = ctypes.CDLL(os.path.join(_FOLDER, "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)

import triton  # noqa: E402
from triton.backends.nvidia import driver  # noqa: E402

driver.CudaDriver.is_active = staticmethod(lambda: True)
_driver = driver.CudaDriver()
_driver.get_device_capability = lambda device=None: CAPABILITY
_driver.get_current_device = lambda: 0
_driver.get_current_stream = lambda device: 0
triton.runtime.driver.set_active(_driver)

from todo_attn.kernels import configs  # noqa: E402

configs.CPU_CAPABILITY = CAPABILITY  # the tensors are the CPU's

launches = ctypes.c_ulonglong.in_dll(_library, "fake_launches")
descriptors = ctypes.c_ulonglong.in_dll(_library, "fake_descriptors")
