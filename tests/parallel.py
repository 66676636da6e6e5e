"""A small stack, its step divided among ranks in each way that torch has, as every rank runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from normfuse.backend import normfuse
from normfuse.explain import explain_with
from tests import float64
from tests.blocks import GemmaRMSNorm, LlamaRMSNorm

WIDTH, ROWS = 64, 32
Settings = dict[str, Any] | None  # of torch.compile; None is eager
SEEN: list[str] = []  # a list of the caller's would be copied with the options


class Layer(nn.Module):
    """Add, norm, branch: the second half of a Llama layer."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x, residual):
        total = x + residual
        return self.down(F.silu(self.up(self.norm(total)))), total


class Stack(nn.Module):
    """Two layers, with one spelling of the norm each."""

    def __init__(self):
        super().__init__()
        norms = LlamaRMSNorm(WIDTH), GemmaRMSNorm(WIDTH)
        self.layers = nn.ModuleList(Layer(norm) for norm in norms)

    def forward(self, x, residual):
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x + residual


class ExactNorm(nn.Module):
    """The formula of a norm, in float64."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.offset = norm.weight, float(isinstance(norm, GemmaRMSNorm))

    def forward(self, x):
        return float64.rms_norm(x, self.weight, 1e-6, self.offset)


def exact(model: Stack) -> Stack:
    wide = copy.deepcopy(model).double()
    for layer in wide.layers:
        layer.norm = ExactNorm(layer.norm)
    return wide


def compiled(function: Any, settings: Settings) -> Any:
    return function if settings is None else torch.compile(function, **settings)


@cache
def mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (distributed.get_world_size(),))


def replicated(model: Stack, settings: Settings, device: str) -> Callable[..., Any]:
    """DDP around what is compiled."""
    return nn.parallel.DistributedDataParallel(compiled(model, settings), static_graph=True)


def replicated_whole(model: Stack, settings: Settings, device: str) -> Callable[..., Any]:
    """DDP inside what is compiled: Dynamo cuts the graph into one for each of its buckets."""
    distributed._DEFAULT_FIRST_BUCKET_BYTES = 1  # what it holds closes a bucket: one a layer
    module = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
    return compiled(module, settings)


def sharded_layers(model: Stack, settings: Settings, device: str) -> Callable[..., Any]:
    """FSDP2 around layers that are compiled one by one."""
    for layer in model.layers:
        if settings is not None:
            layer.compile(**settings)
        fully_shard(layer, mesh=mesh(device))
    return fully_shard(model, mesh=mesh(device))


def sharded_whole(model: Stack, settings: Settings, device: str) -> Callable[..., Any]:
    """FSDP2 inside what is compiled."""
    return compiled(sharded_layers(model, None, device), settings)


def divided_products(model: Stack, settings: Settings, device: str) -> Callable[..., Any]:
    """Tensor parallel products; every rank computes all of every norm."""
    plan = {}
    for index in range(len(model.layers)):
        plan[f"layers.{index}.up"] = ColwiseParallel()
        plan[f"layers.{index}.down"] = RowwiseParallel()
    return compiled(parallelize_module(model, mesh(device), plan), settings)


def divided_rows(model: Stack, settings: Settings, device: str) -> Callable[..., Any]:
    """Tensor parallel products, and norms whose rows are divided: DTensors go through them."""
    plan = {}
    for index in range(len(model.layers)):
        plan[f"layers.{index}.norm"] = SequenceParallel(sequence_dim=0)
        plan[f"layers.{index}.up"] = ColwiseParallel(input_layouts=Shard(0))
        plan[f"layers.{index}.down"] = RowwiseParallel(
            output_layouts=Shard(0), use_local_output=False
        )
    return compiled(parallelize_module(model, mesh(device), plan), settings)


def divided_columns(model: Stack, settings: Settings, device: str) -> Callable[..., Any]:
    """DTensors whose columns are divided: no rank can compute a statistic alone."""
    return compiled(distribute_module(model, mesh(device)), settings)


# How the inputs of each are placed on the mesh; where they are plain tensors, None. Of data
# parallelism every rank has inputs of its own.
PLACEMENTS = {divided_products: None, divided_rows: Shard(0), divided_columns: Shard(1)}
DATA = (replicated, replicated_whole, sharded_layers, sharded_whole)
Way = Callable[[Stack, Settings, str], Callable[..., Any]]


class Step(NamedTuple):
    """The result of a rank, the gradients of all weights, and the ops that the graphs had."""

    values: list[torch.Tensor]
    eager: list[torch.Tensor]
    exact: list[torch.Tensor]
    ops: list[str]


def step(way: Way, lowering: str, device: str, dtype: torch.dtype, grad: bool) -> Step:
    """What `way` gives under our backend, in eager, and, on one rank alone, in float64."""
    options = {
        "normfuse.lowering": lowering,
        "disable_cpp_codegen": True,
        "post_grad_custom_post_pass": note_ops,
    }
    torch._dynamo.reset()
    SEEN.clear()
    ours, eager = (
        values(way, settings, device, dtype, grad)
        for settings in ({"backend": normfuse, "options": options}, None)
    )
    return Step(ours, eager, exact_values(way, device, dtype, grad), list(SEEN))


def note_ops(graph: torch.fx.Graph) -> None:
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    SEEN.extend(t._opname for t in called if getattr(t, "namespace", "") == "normfuse")


def reasons(way: Way, device: str, dtype: torch.dtype, grad: bool) -> list[tuple[str, str]]:
    """The op of every norm, and why it has none."""
    function = way(stack(device, dtype), None, device)
    *operands, _ = inputs(0, way, device, dtype, grad)
    with torch.set_grad_enabled(grad):
        report = explain_with(function, operands, options={"normfuse.lowering": "op"})
    return [(site.op, site.reason) for site in report.sites]


def values(
    way: Way, settings: Settings, device: str, dtype: torch.dtype, grad: bool
) -> list[torch.Tensor]:
    """Of the second step, whose buckets and hooks know what the first has shown them."""
    model = stack(device, dtype)
    function = way(model, settings, device)
    of_rank = distributed.get_rank() if way in DATA else 0
    for _ in range(2):
        model.zero_grad()
        x, residual, upstream = inputs(of_rank, way, device, dtype, grad)
        with torch.set_grad_enabled(grad):
            y = whole(function(x, residual))
            if grad:
                (y * upstream).sum().backward()
    results = [y.detach(), *(whole(p.grad) for p in model.parameters() if grad)]
    return [tensor.cpu() for tensor in results]


def exact_values(way: Way, device: str, dtype: torch.dtype, grad: bool) -> list[torch.Tensor]:
    """Without any group; of data parallelism, the mean of the gradients over all ranks."""
    model = exact(stack(device, dtype))
    rank, size = distributed.get_rank(), distributed.get_world_size()
    results = []
    for of_rank in range(size if way in DATA else 1):
        x, residual, upstream = (t.double() for t in plain_inputs(of_rank, device, dtype))
        results.append(model(x, residual))
        (results[-1] * upstream).sum().backward()
    y = results[rank if way in DATA else 0].detach()
    gradients = [p.grad / len(results) for p in model.parameters() if grad]
    return [tensor.cpu() for tensor in (y, *gradients)]


def stack(device: str, dtype: torch.dtype) -> Stack:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return Stack().to(device, dtype)


def plain_inputs(rank: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """The branch, the residual, and the gradient of the result."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3, ROWS, WIDTH, generator=generator).to(device, dtype)


def inputs(
    rank: int, way: Way, device: str, dtype: torch.dtype, grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `way` wants them; they learn, as what an embedding gives does."""
    x, residual, upstream = plain_inputs(rank, device, dtype)
    x, residual = (t.detach().requires_grad_(grad) for t in (x, residual))
    placement = PLACEMENTS.get(way)
    if placement is not None:
        x, residual = (distribute_tensor(t, mesh(device), [placement]) for t in (x, residual))
    return x, residual, upstream


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The values of all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
