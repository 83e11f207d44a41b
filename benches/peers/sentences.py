"""Sentences per second of a BERT checkpoint: PyTorch and examples/embed.rs in turn, on the same tokens and threads.

    python benches/peers/sentences.py FOLDER [--threads 1,2] [--rounds 9] [--repeat 1]

FOLDER as in embeddings.py. The sentences go through the model as one padded batch, tokens at hand; a round is some seconds
of one and then of the other, the ratio the median over rounds.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import tempfile
import time

import torch
from transformers import AutoModel, AutoTokenizer

from ours import ROOT, built

SECONDS = 2


def ours(program, folder, sentences, threads):
    command = [program, "--model", folder, "--sentences", sentences, "--bench", str(SECONDS)]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(re.search(r"softmax: ([0-9.]+) sentences/s", printed)[1])


def embed(model, batch):
    mask = batch["attention_mask"][..., None].float()
    hidden = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def theirs(model, batch, threads):
    torch.set_num_threads(threads)
    seconds, start = [], time.perf_counter()
    with torch.inference_mode():
        embed(model, batch)
        while time.perf_counter() - start < SECONDS:
            before = time.perf_counter()
            embed(model, batch)
            seconds.append(time.perf_counter() - before)
    return len(batch["input_ids"]) / statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeat", type=int, default=1, help="how often the ten sentences are in the batch")
    args = parser.parse_args()
    lines = [line for line in (ROOT / "examples/embed/sentences.txt").read_text("utf-8").splitlines() if line.strip()]
    lines *= args.repeat
    tokenizer, model = AutoTokenizer.from_pretrained(args.folder), AutoModel.from_pretrained(args.folder).eval()
    batch = tokenizer(lines, padding="longest", truncation=True, return_tensors="pt")
    program = built("embed")
    with tempfile.TemporaryDirectory() as folder:
        sentences = pathlib.Path(folder) / "sentences.txt"
        sentences.write_text("\n".join(lines), "utf-8")
        print(f"{len(lines)} sentences of {batch['input_ids'].shape[1]} tokens at most, PyTorch {torch.__version__}")
        print("| threads | PyTorch sentences/s | ours sentences/s | ours over PyTorch |")
        print("| ---: | ---: | ---: | ---: |")
        for threads in map(int, args.threads.split(",")):
            rounds = [(theirs(model, batch, threads), ours(program, args.folder, sentences, threads)) for _ in range(args.rounds)]
            their_rate, our_rate = (statistics.median(rates) for rates in zip(*rounds))
            ratio = statistics.median(mine / their for their, mine in rounds)
            print(f"| {threads} | {their_rate:.1f} | {our_rate:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
