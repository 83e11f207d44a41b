"""Our side: the example program `peer_bench`, driven line by line."""

import json
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Ours:
    def __init__(self):
        command = ["cargo", "build", "--release", "--no-default-features", "--example", "peer_bench"]
        messages = subprocess.run(
            [*command, "--message-format", "json-render-diagnostics"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        artifacts = [json.loads(line) for line in messages.splitlines()]
        program = [a["executable"] for a in artifacts if a.get("target", {}).get("name") == "peer_bench"][-1]
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("peer_bench ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"peer_bench: {answer['error']}")
        return answer

    def prepare(self, **case):
        """Makes inputs and checks the results against the reference."""
        self.ask({"case": case})

    def seconds(self, repeats):
        """Seconds of one run, averaged over `repeats`."""
        return self.ask({"sample": repeats})["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
