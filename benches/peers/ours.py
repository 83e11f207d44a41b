"""Our side: the example programs `peer_bench`, the engines alone, and `peer_candle`, driven line by line."""

import json
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]


def built(program, features=()):
    """The path of an example; those that need no candle are built without it."""
    command = ["cargo", "build", "--release", "--example", program]
    if program in ("peer_bench", "peer_delta"):
        command += ["--no-default-features", "--features", ",".join(features)]
    messages = subprocess.run(
        [*command, "--message-format", "json-render-diagnostics"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    artifacts = [json.loads(line) for line in messages.splitlines()]
    return [a["executable"] for a in artifacts if a.get("target", {}).get("name") == program][-1]


class Ours:
    def __init__(self, program=None, features=(), name="peer_bench", threads=None):
        """`program` is the example if it is built already; `threads` is what candle's own operations take."""
        self.name, self.program = name, program or built(name, features)
        # candle's threads sleep between operations, as the README advises.
        environment = {"CANDLE_BARRIER_POOL_SPIN_LIMIT": "1", **os.environ}
        if threads is not None:
            environment["RAYON_NUM_THREADS"] = str(threads)
        self.process = subprocess.Popen(
            [self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"{self.name} ended") from None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def prepare(self, **case):
        """Makes inputs and checks the results against the reference, or reads inputs from a file."""
        self.ask({"case": case})

    def prepare_operations(self, **case):
        """The same as operations of candle's tensors (`peer_candle`)."""
        self.ask({"operations": case})

    def samples(self, count):
        """Seconds of each of at least so many runs on a GPU, and what the host is busy for with one."""
        answer = self.ask({"sample": count})
        return answer["seconds"], answer["host_seconds"], answer["extra_bytes"]

    def results(self, path):
        """Writes the results to a file, in f32."""
        self.ask({"results": str(path)})

    def plot(self, path, title, lines, x="length (tokens)", y="median time (ms)"):
        """`lines` are names and points."""
        self.ask({"plot": {"path": str(path), "title": title, "x": x, "y": y, "lines": lines}})

    def seconds(self, repeats):
        """Seconds of one run, averaged over `repeats`."""
        return self.ask({"sample": repeats})["seconds"][0]

    def close(self):
        self.process.communicate()
