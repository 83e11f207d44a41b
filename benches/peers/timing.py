"""Times of PyTorch functions on a device, and what the device can do at most."""

import math
import statistics
import time

import torch

# Runs that are put on the stream at once.
BATCH = 20
# Bytes that the device clears while the host is ahead, and the fewest times: about a millisecond.
CLEARED, CLEARINGS = 1 << 28, 16


class Timer:
    """On a GPU a run's time is that between two events of the device, behind work that lets the host get ahead, so that
    the device never waits for it; on the CPU that of a clock."""

    def __init__(self, device):
        self.device = device
        if device.type == "cuda":
            self.cleared = torch.empty(CLEARED, dtype=torch.uint8, device=device)
            self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.clear_seconds = min(self.events([self.cleared.zero_], BATCH)[0])

    def copies(self, case):
        """Sets of operands that are used in turn, enough for none to be in the cache when it is read."""
        if self.device.type != "cuda":
            return 1
        return min(max(math.ceil(2 * self.cache_bytes / case.bytes()), 1), BATCH)

    def samples(self, runs, count, host_seconds=0.0):
        """Seconds of each of `count` calls of `runs` in turn, and what the host is busy for with one; `host_seconds`
        is a guess of that."""
        if self.device.type == "cuda":
            return self.events(runs, count, host_seconds)
        seconds = []
        for i in range(count):
            start = time.perf_counter()
            runs[i % len(runs)]()
            seconds.append(time.perf_counter() - start)
        return seconds, statistics.median(seconds)

    def events(self, runs, count, host_seconds=0.0):
        torch.cuda.synchronize()
        if host_seconds > 0:
            for _ in range(max(CLEARINGS, math.ceil(1.5 * count * host_seconds / self.clear_seconds))):
                self.cleared.zero_()
        spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        start = time.perf_counter()
        for i, (before, after) in enumerate(spans):
            before.record()
            runs[i % len(runs)]()
            after.record()
        host = (time.perf_counter() - start) / count
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in spans], host

    def bounds(self):
        """Measured rates: bytes per second of a copy, and operations per second of a large bf16 product."""
        is_gpu = self.device.type == "cuda"
        size, width = (1 << 30, 8192) if is_gpu else (1 << 26, 1024)
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(width, width, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        rates = []
        for work, run in [(2 * size, lambda: target.copy_(source)), (2 * width**3, lambda: torch.mm(a, b, out=out))]:
            self.samples([run], 3)
            rates.append(work / statistics.median(self.samples([run], BATCH, 1e-4)[0]))
        return {"bytes_per_second": rates[0], "flops_per_second": rates[1]}
