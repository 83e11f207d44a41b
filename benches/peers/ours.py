"""Our side: the example program `peer_bench`, driven line by line."""

import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]


def built(features):
    command = ["cargo", "build", "--release", "--no-default-features", "--example", "peer_bench"]
    messages = subprocess.run(
        [*command, "--features", ",".join(features), "--message-format", "json-render-diagnostics"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    artifacts = [json.loads(line) for line in messages.splitlines()]
    return [a["executable"] for a in artifacts if a.get("target", {}).get("name") == "peer_bench"][-1]


class Ours:
    def __init__(self, program=None, features=()):
        """`program` is the example if it is built already."""
        self.program = program or built(features)
        self.process = subprocess.Popen([self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError("peer_bench ended") from None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("peer_bench ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"peer_bench: {answer['error']}")
        return answer

    def prepare(self, **case):
        """Makes inputs and checks the results against the reference, or reads inputs from a file."""
        self.ask({"case": case})

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
