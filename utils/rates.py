"""What a device achieves, and how long an operator or a collective takes with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

PRODUCT, CONVOLUTION, DEPTHWISE, NORMALIZATION, OTHER = "product", "convolution", "depthwise", "normalization", "other"
ARITHMETIC, MEMORY, LAUNCHES, NETWORK = "arithmetic", "memory", "launches", "network"


class Operator(NamedTuple):
    """What one call of an operator asks of the device."""

    kind: str
    low: bool  # bfloat16 or float16
    flops: int
    bytes: int
    launches: int


@dataclass(frozen=True)
class Rates:
    """What a device achieves."""

    flops: Mapping[str, float]  # per second in float32, by kind
    low_flops: Mapping[str, float]  # the same of bfloat16 and float16
    bandwidth: Mapping[str, float]  # bytes per second, by kind
    launch: float  # seconds
    cached_bandwidth: float = 0.0  # of operators that touch up to `cache_bytes`, unless their kind has a bandwidth
    cache_bytes: int = 0
    node: int = 8  # GPUs of a node
    node_bandwidth: float = math.inf  # bytes per second of a GPU to the others of its node, in one direction
    network_bandwidth: float = math.inf  # of a GPU to other nodes
    node_latency: float = 0.0  # seconds of each of the log2(W) stages of a collective
    network_latency: float = 0.0

    def bounds(self, operator: Operator) -> dict[str, float]:
        """Seconds that arithmetic, memory and launches of a call would take alone."""
        rate = (self.low_flops if operator.low else self.flops).get(operator.kind, math.inf)
        others = self.cached_bandwidth if 0 < operator.bytes <= self.cache_bytes else self.bandwidth[OTHER]
        bandwidth = others if operator.kind == OTHER else self.bandwidth.get(operator.kind, others)
        return {ARITHMETIC: operator.flops / rate, MEMORY: operator.bytes / bandwidth,
                LAUNCHES: operator.launches * self.launch}

    def collective(self, size: float, world_size: int, passes: int = 1) -> float:
        """Seconds of a ring over all GPUs: an all-gather or reduce-scatter whose whole is `size` bytes.

        All GPUs of a node send to other nodes at once, each through its own adapter, and none faster than in its node.
        passes: 2 for an all-reduce.
        """
        if world_size == 1:
            return 0.0
        nodes = -(-world_size // self.node)
        bandwidth = self.node_bandwidth
        if nodes > 1:
            bandwidth = min(bandwidth, min(world_size, self.node) * self.network_bandwidth)
        latency = (math.ceil(math.log2(min(world_size, self.node))) * self.node_latency
                   + math.ceil(math.log2(nodes)) * self.network_latency)
        return passes * (latency + size * (world_size - 1) / world_size / bandwidth)


@dataclass(frozen=True)
class DataSheet:
    """A GPU as its vendor describes it: dense TFLOP/s, GB/s, and GB/s in one direction."""

    name: str
    low_tflops: float  # bfloat16 and float16
    tf32_tflops: float
    memory_gbs: float
    nvlink_gbs: float
    network_gbs: float  # one adapter for each GPU, in the vendor's own node of 8
    memory_gib: float  # that PyTorch sees: the vendor's GB are not 10^9 bytes, and some of it is taken
    cache_mib: int


# The SXM forms. NVIDIA's data sheets have most rates with sparsity, which is twice these. Sources:
# - Rates, memory, NVLink (half of what is stated for both directions): NVIDIA A100 data sheet; H100 data sheet and
#   Hopper white paper; H200 data sheet; Blackwell architecture technical brief, for an HGX B200 of 1,000 W. They were
#   read in tables of others that cite them (glennklockwood.com: A100, h100, B200; archive-lib.hpctech.co.jp:
#   nvidia-h100; docs.vultr.com: HGX B200), not in NVIDIA's own files. The brief rounds B200's TF32 to 1,100; here it is
#   half of its bfloat16, as on the other GPUs. H200's rates and cache are H100's: no source states the cache.
# - Memory and cache of B200: what its driver reports (pytorch/ao, pull request 4002); NVIDIA states 8,000 GB/s.
# - Cache of A100: what its driver reports, 41,943,040 bytes. H100: the tables above.
# - Memory of the others: "total capacity" in errors of PyTorch that users have published.
# - Network: DGX BasePOD reference architecture, "Core components": 400 Gbit/s for each GPU of DGX H100, H200 and B200.
#   200 Gbit/s for DGX A100 is from memory: no source was found.
DEVICES = {
    "a100": DataSheet("A100 SXM 80 GB", 312, 156, 2039, 300, 25, 79.25, 40),
    "h100": DataSheet("H100 SXM", 989, 494, 3350, 450, 50, 79.18, 50),
    "h200": DataSheet("H200 SXM", 989, 494, 4800, 450, 50, 139.8, 50),
    "b200": DataSheet("B200 SXM", 2250, 1125, 7672, 900, 50, 178.35, 126),
}


@dataclass(frozen=True)
class Shares:
    """What is assumed to be achieved of the data sheets, and latencies in microseconds. No GPU was measured."""

    arithmetic: float = 0.7  # 700 of an H100's 989 TFLOP/s
    convolution: float = 0.5  # of cuDNN, over a network's layers
    depthwise: float = 0.02  # runs without tensor cores
    memory: float = 0.865  # 2.9 of an H100's 3.35 TB/s
    network: float = 0.8
    launch_us: float = 5.0
    node_latency_us: float = 5.0
    network_latency_us: float = 10.0


def gpu_rates(sheet: DataSheet, shares: Shares, node: int = 8) -> Rates:
    """The rates of a GPU: float32 products and convolutions in TF32."""
    by_kind = {PRODUCT: shares.arithmetic, CONVOLUTION: shares.convolution, DEPTHWISE: shares.depthwise}
    return Rates(
        flops={kind: share * sheet.tf32_tflops * 1e12 for kind, share in by_kind.items()},
        low_flops={kind: share * sheet.low_tflops * 1e12 for kind, share in by_kind.items()},
        bandwidth={OTHER: shares.memory * sheet.memory_gbs * 1e9}, launch=shares.launch_us * 1e-6, node=node,
        node_bandwidth=shares.network * sheet.nvlink_gbs * 1e9,
        network_bandwidth=shares.network * sheet.network_gbs * 1e9,
        node_latency=shares.node_latency_us * 1e-6, network_latency=shares.network_latency_us * 1e-6)
