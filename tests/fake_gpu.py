"""A GPU that is not there: tensors that say they are on one, and are computed on the CPU.

Two faults of a program on a GPU do not show on a CPU: an operation on tensors of both, which is an
error, and one for whose result Python waits (a synchronisation), which is slow. Here the first is
an error, too, and the second is counted. The values are real, so that decoding, which looks at
them, runs to its end. PyTorch's own FakeTensorMode has no values; and where PyTorch is built for
CPUs alone, a slice of its CUDA tensors is refused, and a gradient of them ends the process.
"""
import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class Backend(_DummyBackendModule):
    """What PyTorch asks a device for, in the place of torch.cuda."""

    def get_amp_supported_dtype(self):
        return []


_setup_privateuseone_for_python_backend("fakegpu", Backend())
GPU = torch.device("fakegpu:0")

aten = torch.ops.aten
# Their results have a size, or are a Python number, that only the GPU knows.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero,
         aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.multinomial,
         aten.repeat_interleave}
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class GPUTensor(torch.Tensor):
    """Says that it is on GPU; `value` is on the CPU."""

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype, device=GPU)

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return f"GPUTensor({self.value})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor on the GPU, outside FakeGPU")


def on_gpu(x):
    return isinstance(x, GPUTensor)


def changed(x, change):
    """x, arguments or results of an operation, with each tensor in it changed."""
    if isinstance(x, torch.Tensor):
        return change(x)
    if isinstance(x, (list, tuple)):
        return type(x)([changed(y, change) for y in x])
    return {name: changed(y, change) for name, y in x.items()} if isinstance(x, dict) else x


class FakeGPU(TorchDispatchMode):
    """Within it GPU can be used. syncs: names of the operations that Python waited for."""

    def __init__(self):
        super().__init__()
        self.syncs = []

    def check(self, func, args, kwargs, target, tensors):
        """Count a synchronisation, refuse a mixture."""
        op, here = func.overloadpacket, [x for x in tensors if not on_gpu(x)]
        if op in COPIES:
            to_gpu = (target or args[0].device) == GPU
            crosses = bool(here) and to_gpu or any(map(on_gpu, tensors)) and not to_gpu
            late = kwargs.get("non_blocking", args[2] if op is aten.copy_ and len(args) > 2 else 0)
            if crosses and not (to_gpu and late):
                self.syncs.append(str(func))
            return
        if not any(map(on_gpu, tensors)):
            return
        if op in INDEXING:
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) or not on_gpu(x) for x in indices):
                self.syncs.append(str(func))
            here = [x for x in here if not any(x is i for i in indices)]
        elif op in WAITS:
            self.syncs.append(str(func))
        if any(x.dim() for x in here):
            raise RuntimeError(f"{func}: tensors on the CPU and on the GPU")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        if target is not None and target.type == GPU.type:
            target, kwargs["device"] = GPU, torch.device("cpu")
        tensors = []

        def value(x):
            tensors.append(x)
            return x.value if on_gpu(x) else x
        plain_args, plain_kwargs = changed((args, kwargs), value)
        self.check(func, args, kwargs, target, tensors)
        any_gpu = any(map(on_gpu, tensors))
        wrap = target == GPU or target is None and any_gpu
        out = func(*plain_args, **plain_kwargs)
        if wrap:
            out = changed(out, GPUTensor)
        if func.overloadpacket is aten._to_copy or not any_gpu:
            return out
        return return_and_correct_aliasing(func, args, kwargs, out) if wrap else out


class FromLists(TorchFunctionMode):
    """torch.tensor(list, device=GPU) and x[list]: they copy and wait, unseen by the dispatcher."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})

        def copied(values, **options):
            self.gpu.syncs.append(func.__name__)
            return torch.tensor(values, **options).to(GPU, non_blocking=True)
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == GPU:
            return copied(*args, **kwargs | {"device": "cpu"})
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and on_gpu(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(copied(i, dtype=torch.long) if isinstance(i, list) else i for i in index)
            args = args[0], index, *args[2:]
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_gpu():
    """Within it GPU can be used; gives the FakeGPU that counts."""
    with FakeGPU() as gpu, FromLists(gpu), torch.autograd.set_multithreading_enabled(False):
        yield gpu
