"""Ranks, device, precision, DDP and collectives: everything that a workload must not know.

A run is a world of processes that were started by torchrun, by srun, or by hand; one process alone is a world of one
with the same process group. Differences between torch versions are handled here and nowhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import functools
import inspect
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.description import Batch
from ..metrics.evaluator import Totals
from ..nn.norm import convert_batch_norm
from ..randomness import Draws
from ..storage.checkpoint import Groups
from ..workload import Phase, Scalars, Workload
from . import elastic
from .deadline import Deadline
from .process import LaunchError, ProcessInfo, threads_per_rank
from .signals import StopSignals

TIMEOUT = datetime.timedelta(minutes=5)
LEFT = 75  # the exit code EX_TEMPFAIL: try again


class Votes(NamedTuple):
    """What a rank wants at a step boundary; summed, how many ranks want it. A rank votes again until it is answered."""

    stop: int = 0
    save: int = 0
    finish: int = 0
    lease_lost: int = 0
    bad_samples: int = 0  # that this rank has met


class Runtime:
    """The process group and the device of a run. Use as a context manager."""

    def __init__(
        self, process: ProcessInfo, *, device: str = "auto", precision: str = "auto", batch_norm: str = "sync",
        deterministic: bool = False, threads: int | None = None, signals: StopSignals | None = None,
    ) -> None:  # fmt: skip
        from accelerate import PartialState

        threads = threads_per_rank(process, threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for child processes, and instead of accelerate's choice
        torch.set_num_threads(threads)
        if process.local_world == process.world:  # one node: gloo must not listen beyond it
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback())
        accelerated = device == "auto" and torch.accelerator.is_available()
        # NCCL takes one rank a GPU; more than that share it over gloo, which copies through the CPU.
        self.shares_device = accelerated and process.local_world > torch.accelerator.device_count()
        self._connect(process, _device_backends() if accelerated and not self.shares_device else "gloo")
        os.environ.setdefault("LOCAL_RANK", str(process.local_rank))  # where PartialState takes the device's index from
        self.device = PartialState(cpu=not accelerated).device if accelerated else torch.device("cpu")
        if self.device.type == "cpu":
            _keep_freed_memory()
        _choose_algorithms(deterministic)
        self.rank, self.world, self.main = process.rank, process.world, process.rank == 0
        self.local_world, self.local_main = process.local_world, process.local_rank == 0
        self._agents = process.agents
        self.batch_norm = batch_norm
        self.precision = ("bf16" if accelerated else "fp32") if precision == "auto" else precision
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        self.autocast_dtype = torch.bfloat16 if self.precision == "bf16" else None
        self._control: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.world > 1 else None
        self._poll: tuple[Tensor, Any] | None = None
        self.signals = signals or StopSignals()
        self.deadline = Deadline()

    def _connect(self, process: ProcessInfo, backend: str) -> None:
        if process.world == 1:
            store: Any = dist.HashStore()  # type: ignore[attr-defined]
        else:
            listens = process.rank == 0 and not process.agent
            if listens:
                _check_port(process.port)
            try:
                tcp = dist.TCPStore(process.address, process.port, process.world, listens, TIMEOUT)  # type: ignore[attr-defined]
            except (dist.DistNetworkError, dist.DistStoreError) as error:
                raise LaunchError(
                    f"rank {process.rank} cannot reach {process.address}:{process.port}: {str(error).splitlines()[0]}"
                ) from None
            # In-place restarts under torchrun must not see the keys of the attempt before: gloo would hang on them.
            attempt = process.restart
            if process.torchrun or process.agent:
                elastic.die_with_parent()
                try:
                    attempt = elastic.agree_on_attempt(tcp, process.rank, process.world, TIMEOUT)
                except (TimeoutError, dist.DistError) as error:
                    raise LaunchError(f"rank {process.rank}: the ranks do not find each other: {error}") from None
            store = dist.PrefixStore(f"trainer/{attempt}", tcp)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=process.rank, world_size=process.world, timeout=TIMEOUT)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            dist.destroy_process_group()

    @property
    def signalled(self) -> str:
        """What asked this rank to stop: a signal, or the end of the job's time; or ''."""
        return self.signals.received or self.deadline.reached()

    # Collectives. Everything that steers control flow goes through these, so that no rank decides alone.

    def agree(self, votes: Votes) -> Votes:
        """The sum of the votes of all ranks, as of the call before: the exchange overlaps with a step.

        Every rank gets the same answer at the same step; a world of one gets its own at once.
        """
        if self._control is None:
            return votes
        answer = Votes()
        if self._poll is not None:
            tensor, work = self._poll
            work.wait()
            answer = Votes(*tensor.tolist())
        tensor = torch.tensor(votes, dtype=torch.int64)
        self._poll = (tensor, dist.all_reduce(tensor, group=self._control, async_op=True))
        return answer

    def settle(self) -> None:
        """Drop an exchange that is still under way."""
        if self._poll is not None:
            self._poll[1].wait()
            self._poll = None

    def stopping(self) -> bool:
        """Whether any rank was asked to stop; poll in every loop, the same number of times on every rank."""
        return bool(self.agree(Votes(stop=bool(self.signalled))).stop)

    def exit_code(self, code: int, status: str) -> int:
        """A rank that left for a signal to another node's ranks does not tell its torchrun that all is done.

        Where a node joins, every torchrun stops its ranks, and the first signal stops all: those of a torchrun that is
        about to do so would look finished to it.
        """
        left = status == "preempted" and self._agents > 1 and not self.signals.received
        return LEFT if left and not code else code

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value on every rank."""
        if self._control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The plain values of all ranks, in their order, on every rank."""
        if self._control is None:
            return [value]
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, value, group=self._control)
        return boxes

    def total(self, totals: Totals) -> Totals:
        """Sums over the ranks, in float64 on the CPU. Names and shapes come from the ranks that have any."""
        local = {name: value.double().cpu() for name, value in totals.items()}
        if self._control is None:
            return local
        shapes: dict[str, tuple[int, ...]] = {}
        for others in self.gather({name: tuple(value.shape) for name, value in local.items()}):
            shapes.update(others)
        if not shapes:
            return {}
        flat = [local.get(name, torch.zeros(shape, dtype=torch.float64)).flatten() for name, shape in shapes.items()]
        summed = torch.cat(flat)
        dist.all_reduce(summed, group=self._control)
        parts = torch.split(summed, [part.numel() for part in flat])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def sum_scalars(self, scalars: Scalars) -> Scalars:
        """Sums over the ranks, on the device, without a host sync."""
        if self.world == 1 or not scalars:
            return scalars
        packed = torch.stack([value.double() for value in scalars.values()])
        dist.all_reduce(packed)
        return dict(zip(scalars, packed.unbind(), strict=True))

    def broadcast_groups(self, groups: Groups | None) -> Groups:
        """Rank 0's named tensors, on the CPU, on every rank; only rank 0 reads storage."""
        if self._control is None:
            assert groups is not None
            return groups
        shapes = None if groups is None else {
            group: {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} for group, tensors in groups.items()
        }  # fmt: skip
        received: Groups = groups or {}
        for group, tensors in self.broadcast(shapes).items():
            for name, (shape, dtype) in tensors.items():
                tensor = received.setdefault(group, {}).setdefault(name, torch.empty(shape, dtype=dtype))
                dist.broadcast(tensor.view(torch.uint8) if tensor.dim() else tensor, src=0, group=self._control)
        return received

    # Set-up of a workload.

    def channels_last(self, workload: Workload, setting: bool | None) -> bool:
        """The memory format of a run: what the user has set, else what the device or the network says is faster."""
        tensor_cores = self.device.type == "cuda" and self.autocast_dtype is not None
        return (tensor_cores or workload.channels_last) if setting is None else setting

    def prepare(self, workload: Workload, channels_last: bool | None, compiled: bool) -> None:
        """Move the workload to the device, in this run's precision, memory format and kind of BatchNorm."""
        if self.world > 1 and self.batch_norm == "sync":
            nccl = self.device.type == "cuda" and not self.shares_device
            convert = nn.SyncBatchNorm.convert_sync_batchnorm if nccl else convert_batch_norm
            convert(workload)
        workload.to(self.device, self.dtype)
        if self.channels_last(workload, channels_last):
            workload.to(memory_format=torch.channels_last)
        if compiled:
            for network in workload.children():
                if any(parameter.requires_grad for parameter in network.parameters()):
                    network.compile()

    def per_rank_buffers(self, workload: Workload) -> dict[str, Tensor]:
        """Buffers that differ from rank to rank: the running statistics of local BatchNorm."""
        if self.world == 1 or self.batch_norm == "sync":
            return {}
        return {
            f"{name}.{key}": buffer
            for name, module in workload.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for key, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        }

    @contextlib.contextmanager
    def averaged(self, buffers: dict[str, Tensor]) -> Iterator[None]:
        """The mean over the ranks in place of each rank's own buffers; put back afterwards."""
        own = [buffer.clone() for buffer in buffers.values()]
        for buffer in buffers.values():
            dist.all_reduce(buffer)
            buffer /= self.world
        try:
            yield
        finally:
            for buffer, mine in zip(buffers.values(), own, strict=True):
                buffer.copy_(mine)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def no_sync(self, loss: PhaseModule) -> contextlib.AbstractContextManager[Any]:
        """Leave the gradients to be reduced with those of a later micro-batch; the forward pass belongs inside."""
        return loss.no_sync() if isinstance(loss, DistributedDataParallel) else contextlib.nullcontext()

    def ddp(self, phase: Phase) -> PhaseModule:
        """The phase's loss, called through DDP where there are other ranks."""
        loss = PhaseLoss(phase)
        if self.world == 1:
            return loss
        # DDP rearranges its buckets after its first backward pass, and the order in which three ranks or more add up
        # depends on the place in a bucket: a resumed run would round otherwise than one that was never cut. Looking
        # for unused parameters, of which there are none, keeps the arrangement. No bits are promised on a GPU.
        keep = self.world > 2 and self.device.type == "cpu"
        if keep:
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        return DistributedDataParallel(
            loss,
            gradient_as_bucket_view=True,
            find_unused_parameters=keep,
            **_no_buffer_sync(),  # type: ignore[arg-type]
        )

    @property
    def can_capture(self) -> bool:
        """Whether steps may become CUDA graphs. Not in double precision: there a learning rate has to be single."""
        return self.device.type == "cuda" and self.world == 1 and self.dtype == torch.float32

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Independent, contiguous copies on the CPU, whole before this returns."""
        copies = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(
                tensor.detach(), non_blocking=True
            )
            for name, tensor in tensors.items()
        }
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def memory(self) -> int:
        """Peak bytes on the accelerator; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


class PhaseLoss(nn.Module):
    """Owns exactly the parameters of one phase; its forward is the loss, so a phase may use networks as it likes."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.trained = nn.ParameterList(phase.parameters)
        self._loss = phase.loss

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        return self._loss(batch, draws)


PhaseModule = PhaseLoss | DistributedDataParallel


@functools.cache
def _no_buffer_sync() -> dict[str, bool]:
    """torch 2.13 renamed broadcast_buffers, which also skips the sync at construction; there are no buffers here."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def _keep_freed_memory() -> None:
    """Have glibc keep large blocks for the next step, which would else fault in every page again: 6 % of DCGAN's."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def _device_backends() -> str:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return f"cpu:gloo,{accelerator}:{dist.get_default_backend_for_device(accelerator)}"


def _choose_algorithms(deterministic: bool) -> None:
    """Either those that give the same bits in every run, or the fastest, found by trying."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed


def loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0] if names else "lo")


def _check_port(port: int) -> None:
    """TCPStore would listen or fail with a page of text; ask first."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise LaunchError(f"MASTER_PORT: port {port} is in use: choose a free one") from None
            raise LaunchError(f"MASTER_PORT: port {port} cannot be used: {error.strerror}") from None
