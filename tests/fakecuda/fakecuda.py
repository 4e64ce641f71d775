"""Runs programs on CUDA devices that do not exist: torch's real CUDA code on a runtime that launches nothing.

    python tests/fakecuda/fakecuda.py [--devices N] [--memory BYTES] [--no_values] SCRIPT [ARGUMENT …]    a program
    python -m pytest -m cuda                                                         the tests for a GPU, see README.md

`fakecuda.c` stands in for libcudart, libcuda, cuBLAS, cuDNN and NCCL. It needs gcc and a CUDA build of torch, but no
GPU and no driver. Tensors are CUDA tensors to all of torch: the caching allocator, streams, autograd threads, device
checks, CUDA graphs and process groups are the real ones, and the rules of stream capture are enforced. Kernels do
nothing; `Values` computes their results, operator by operator, on the same memory. Captured operators are computed when
the graph is replayed, at the addresses of the capture: a graph whose inputs, outputs or intermediate results wrongly
share memory gives wrong numbers here, too. Memory reads as NaN before it is written and after it is freed. Subprocesses
run on the stand-in, too.

`watch` counts launches, copies and host synchronisations, and says which line of the repository caused each.
`--no_values` computes no values: this shows a program's cost on the host, and also runs compiled code (Triton).

Not covered: the time of kernels, the numbers of TF32 and of compiled code, launches that a real GPU would refuse,
asynchrony (copies are immediate, so a missing synchronisation goes unnoticed), collectives other than sums.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "fakecuda.c"
REPOSITORY = HERE.parent.parent
KINDS = ("launch", "library", "graph", "sync", "h2d_pageable", "h2d_pinned", "d2h", "d2d", "memset", "malloc", "free",
         "error")

# Definitions that driver_types.h takes from a header that pip's CUDA runtime lacks.
_SHIM = "\n".join(f"#define {name}" for name in (
    "__device_builtin__", "__device_builtin_texture_type__", "__device_builtin_surface_type__", "__cudart_builtin__",
    "CUDARTAPI", "CUDARTAPI_CDECL", "CUDART_CB", "__host__", "__device__", "__specialization_static")) + """
#define __forceinline__ inline
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
"""


def _installed() -> tuple[Path, Path | None, str | None]:
    """Where torch is installed, the folder of CUDA's headers (None: missing), and torch's version of CUDA, such as
    "13.2" (None: a CPU build)."""
    packages = Path(importlib.util.find_spec("torch").origin).parent.parent
    headers = [*packages.glob("nvidia/cu*/include/driver_types.h"),
               *packages.glob("nvidia/cuda_runtime/include/driver_types.h")]
    cuda = re.search(r"cuda[^=\n]*= '(\d+\.\d+)'", (packages / "torch/version.py").read_text())
    return packages, headers[0].parent if headers else None, cuda and cuda[1]


def why_not() -> str | None:
    """Why the stand-in cannot run here, in words; None: it can."""
    _, headers, cuda = _installed()
    reasons = {"it is for Linux": sys.platform != "linux", "gcc is not on the PATH": shutil.which("gcc") is None,
               "torch is a CPU build": cuda is None, "CUDA's headers did not come with torch": headers is None}
    return next((reason for reason, holds in reasons.items() if holds), None)


def build() -> Path:
    """Compiles the stand-in, once per version; returns the library."""
    packages, headers, cuda = _installed()
    major, minor = map(int, cuda.split("."))
    cudnn = next(iter(packages.glob("nvidia_cudnn_cu*.dist-info"))).name.split("-")[1].split(".")
    flags = [f"-DFAKE_VERSION={1000 * major + 10 * minor}",
             f"-DFAKE_CUDNN={10000 * int(cudnn[0]) + 100 * int(cudnn[1]) + int(cudnn[2])}", "-DFAKE_NCCL=23007"]
    key = hashlib.sha256((SOURCE.read_text() + str(flags) + str(headers)).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"fakecuda-{os.getuid()}" / f"{key}.so"
    if not target.exists():
        shim = target.parent / "shim" / "crt"
        shim.mkdir(parents=True, exist_ok=True)
        (shim / "host_defines.h").write_text(_SHIM)
        aside = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", *flags, f"-I{shim.parent}", f"-I{headers}",
                        "-Wl,-soname,libcuda.so.1", str(SOURCE), "-o", str(aside), "-lpthread", "-ldl", "-lrt"],
                       check=True)
        aside.replace(target)
    return target


# sitecustomize.py of the Python processes that are started: they compute values, too.
_IN_SUBPROCESSES = f"""import os, sys
if os.environ.get("FAKECUDA_VALUES") == "1" and not any("fakecuda.py" in word for word in sys.orig_argv):
    sys.path.append({str(HERE)!r})
    import fakecuda
    fakecuda.start()
"""


def preload(devices: int = 1, memory: int = 80 << 30, values: bool = True) -> None:
    """Restarts the current command with the stand-in preloaded, unless it is already."""
    if "fakecuda" not in os.environ.get("LD_PRELOAD", ""):
        library = str(build())
        link = Path(library).parent / Path(library).stem / "libcuda.so.1"  # where Triton looks for it
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.symlink_to(library)
        (link.parent / "sitecustomize.py").write_text(_IN_SUBPROCESSES)
        path = os.pathsep.join(filter(None, (str(link.parent), os.environ.get("PYTHONPATH"))))
        # One compile thread: Inductor's compile workers hang on the stand-in.
        os.environ |= {"LD_PRELOAD": library, "PYTHONPATH": path, "TRITON_LIBCUDA_PATH": str(link.parent),
                       "TORCHINDUCTOR_COMPILE_THREADS": "1",
                       "FAKECUDA_VALUES": str(int(values)), "FAKECUDA_DEVICES": str(devices),
                       "FAKECUDA_MEMORY": str(memory)}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if "fakecuda" in os.environ.get("LD_PRELOAD", ""):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

    aten = torch.ops.aten
    fake = ctypes.CDLL(None)

    class Record(ctypes.Structure):
        _fields_ = [("name", ctypes.c_char_p), ("kind", ctypes.c_int), ("device", ctypes.c_int),
                    ("captured", ctypes.c_int), ("bytes", ctypes.c_size_t), ("blocks", ctypes.c_uint)]

    _counts = (ctypes.c_long * len(KINDS)).in_dll(fake, "fake_count")

    def set_memory(size: int) -> None:
        """Sets the memory of each GPU; 0: as at the start."""
        ctypes.c_size_t.in_dll(fake, "fake_memory_limit").value = size

    # --- values --------------------------------------------------------------------------------------------------

    def _alias(tensor: "torch.Tensor") -> "torch.Tensor":
        """A CPU tensor over a CUDA tensor's memory, which it does not keep alive."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if not size:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        buffer = (ctypes.c_char * size).from_address(storage.data_ptr())
        base = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(base, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _here(value):
        """An argument moved to the CPU: a tensor as an alias of its memory, a CUDA device as the CPU."""
        if isinstance(value, torch.Tensor):
            return _alias(value) if value.is_cuda else value
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == "cuda" else value
        return value

    def _grid(x, grid):
        return aten.grid_sampler_2d(x, grid, 0, 0, True)

    def _grid_backward(x, grid, grad):
        return aten.grid_sampler_2d_backward(grad, x, grid, 0, 0, True, [True, True])

    def _batch_norm(x, weight, bias, mean, var, training, momentum, eps):
        return *aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps), None

    def _batch_norm_backward(x, grad, weight, mean, var, save_mean, save_var, eps, reserve):
        return aten.native_batch_norm_backward(grad, x, weight, mean, var, save_mean, save_var, True, eps, [True] * 3)

    ON_CPU = {aten.cudnn_grid_sampler.default: _grid, aten.cudnn_grid_sampler_backward.default: _grid_backward,
              aten.cudnn_batch_norm.default: _batch_norm, aten.cudnn_batch_norm_backward.default: _batch_norm_backward}
    # Operators whose result's size or whose CUDA code depends on values: a real GPU synchronises here, too.
    WAITING = {aten.nonzero.default, aten.masked_select.default, aten.bincount.default, aten._unique2.default,
               aten.repeat_interleave.Tensor, aten.equal.default, aten.unique_consecutive.default,
               aten.unique_dim.default, aten._linalg_eigh.default, aten.linalg_inv_ex.default}
    WITHOUT_VALUES = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default,
                      aten.new_empty.default, aten.new_empty_strided.default, aten.resize_.default,
                      aten.set_.source_Storage, aten.record_stream.default, aten._local_scalar_dense.default}

    class Values(TorchDispatchMode):
        """Computes the results of kernels on the memory of CUDA tensors, and records what waits for the device."""

        def __init__(self):
            super().__init__()
            self.captures: dict[int, list] = {}  # device → calls of the graph being captured there
            self.waits: Counter = Counter()  # (kind, operator, line) → how often
            self.operators: Counter = Counter()  # on CUDA tensors
            self.threads: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            flat, _ = tree_flatten((args, kwargs))
            on = [each for each in flat if isinstance(each, torch.Tensor) and each.is_cuda]
            made = [each for each in flat if isinstance(each, torch.device) and each.type == "cuda"]
            if (not on and not made) or func.namespace == "c10d":
                return func(*args, **kwargs)
            device = on[0].device if on else made[0]
            masks = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
                             aten._index_put_impl_.default) and any(
                each is not None and each.dtype in (torch.bool, torch.uint8) and each.is_cuda for each in args[1])
            before = tuple(_counts)
            if func in WAITING or masks:
                if torch.cuda.is_current_stream_capturing():
                    fake.cudaStreamSynchronize(ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream))
                    raise RuntimeError(f"{func} waits for the device, in a capture")
                found = func(*tree_map(_here, args), **tree_map(_here, kwargs))
                self.waits["sync", str(func), _line()] += 1
                if masks and func is not aten.index.Tensor and func is not aten.index_put.default:
                    return args[0]
                return tree_map_only(torch.Tensor, lambda each: each.to(device), found)
            out = func(*args, **kwargs)
            self.operators[str(func)] += 1
            self._note(func, before)
            if func in WITHOUT_VALUES or torch.Tag.inplace_view in func.tags:
                return out
            held = {each.untyped_storage().data_ptr() for each in on}
            new = [each for each in tree_flatten(out)[0] if isinstance(each, torch.Tensor)
                   and not (each.is_cuda and each.untyped_storage().data_ptr() in held)]
            if not new and not func._schema.is_mutable:
                return out  # views
            call = self._call(func, args, kwargs, out)
            with torch.cuda.device(device):
                capturing = torch.cuda.is_current_stream_capturing()
            if capturing:
                self.captures[device.index if device.index is not None else torch.cuda.current_device()].append(call)
            else:
                call()
            return out

        @staticmethod
        def _call(func, args, kwargs, out):
            args, kwargs = tree_map(_here, args), tree_map(_here, kwargs)
            results = tree_flatten(tree_map(_here, out))[0]
            kwargs.pop("pin_memory", None)

            def call():
                found = tree_flatten(ON_CPU.get(func, func)(*args, **kwargs))[0]
                for own, value in zip(results, found):
                    if isinstance(own, torch.Tensor) and isinstance(value, torch.Tensor) and own is not value:
                        if own.shape != value.shape:
                            shapes = [each.shape if isinstance(each, torch.Tensor) else each
                                      for each in tree_flatten((args, kwargs))[0]]
                            raise AssertionError(f"{func}{shapes}: {own.shape} on CUDA, {value.shape} on the CPU")
                        own.copy_(value)
            return call

        def _note(self, func, before) -> None:
            for kind, was, now in zip(KINDS, before, _counts):
                if now > was and kind in ("sync", "h2d_pageable", "d2h", "error"):
                    self.waits[kind, str(func), _line()] += now - was

    def _line() -> str:
        """The innermost line of the repository on the stack; on autograd threads, which have none, their name."""
        frame = sys._getframe(2)
        while frame:
            path = frame.f_code.co_filename
            if path.startswith(str(REPOSITORY)) and path != __file__ and ".venv" not in path:
                return f"{os.path.relpath(path, REPOSITORY)}:{frame.f_lineno} {frame.f_code.co_qualname}"
            frame = frame.f_back
        return f"thread {threading.current_thread().name}"

    def _with_values(mode: Values) -> None:
        """Makes graphs compute the captured calls when they are replayed, and new threads compute values, too."""
        graph = torch.cuda.CUDAGraph
        begin, end, replay = graph.capture_begin, graph.capture_end, graph.replay

        def capture_begin(self, *args, **kwargs):
            begin(self, *args, **kwargs)
            mode.captures[torch.cuda.current_device()] = self.calls = []

        def capture_end(self):
            mode.captures.pop(torch.cuda.current_device(), None)
            end(self)

        def replayed(self):
            replay(self)
            with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
                for call in self.calls:
                    call()

        graph.capture_begin, graph.capture_end, graph.replay = capture_begin, capture_end, replayed
        run = threading.Thread.run

        def run_with_values(self):
            with mode:
                run(self)

        threading.Thread.run = run_with_values
        text = torch._tensor_str._str  # it disables modes, and would read memory that no kernel wrote
        torch._tensor_str._str = lambda self, **options: text(
            _alias(self.detach()) if type(self) is torch.Tensor and self.is_cuda else self, **options)

    _mode: "Values | None" = None

    def start() -> Values:
        """Computes values for all CUDA tensors of this process from now on."""
        global _mode
        if _mode is None:
            _mode = Values()
            _with_values(_mode)
            _mode.__enter__()
        return _mode

    # --- counting ------------------------------------------------------------------------------------------------

    class Seen:
        """What happened inside `watch`: counts by kind, launches by kernel, waits by (kind, operator, line)."""

        def __init__(self):
            self.counts, self.kernels, self.waits, self.errors = Counter(), Counter(), Counter(), Counter()
            self.captured = Counter()

        @property
        def launches(self) -> int:
            """The number of operations put into streams; a graph counts once."""
            return sum(self.counts[kind] for kind in ("launch", "library", "graph", "memset", "d2d", "h2d_pageable",
                                                      "h2d_pinned", "d2h"))

        def __str__(self) -> str:
            lines = [", ".join(f"{kind} {number}" for kind, number in self.counts.items() if number)]
            lines += [f"    {number:6} × {kind}: {operator} at {line}"
                      for (kind, operator, line), number in sorted(self.waits.items(), key=lambda each: -each[1])]
            lines += [f"    error {code}: {name}" for (name, code) in self.errors]
            return "\n".join(lines)

    @contextlib.contextmanager
    def watch():
        recording = ctypes.c_int.in_dll(fake, "fake_recording")
        seen = Seen()
        waits = Counter(_mode.waits) if _mode else Counter()
        fake.fake_forget()
        recording.value = 1
        try:
            yield seen
        finally:
            recording.value = 0
            for each in _read():
                name = (each.name or b"?").decode()
                if each.kind == KINDS.index("error"):
                    seen.errors[name, each.bytes] += 1
                elif each.kind in map(KINDS.index, ("launch", "library", "graph", "memset", "d2d")):
                    (seen.captured if each.captured else seen.kernels)[name] += 1
                seen.counts[KINDS[each.kind] + (" (captured)" if each.captured else "")] += 1
            seen.waits = (Counter(_mode.waits) - waits) if _mode else Counter()

    def _read():
        records = ctypes.POINTER(Record)()
        fake.fake_records.restype = ctypes.c_long
        number = fake.fake_records(ctypes.byref(records))
        return [records[index] for index in range(number)]


def main() -> None:
    arguments, devices, memory, values = sys.argv[1:], 1, 80 << 30, True
    while arguments and arguments[0].startswith("--"):
        name = arguments.pop(0)
        if name == "--devices":
            devices = int(arguments.pop(0))
        elif name == "--memory":
            memory = int(arguments.pop(0))
        elif name == "--no_values":
            values = False
        else:
            sys.exit(f"unknown option {name}")
    preload(devices, memory, values)
    sys.modules["fakecuda"] = sys.modules["__main__"]
    if values:
        start()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
