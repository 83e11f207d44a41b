"""Tables and pictures from the records of gpu.py.

    python benches/peers/report.py target/peers [--into benches/results/h200.md]

Writes peers.md and a picture per recipe and pass to the folder of the records; `--into` puts the tables into a file, in
place of the section of that name. A ratio is the peer's time over ours.
"""

import argparse
import json
import math
import pathlib
import re

from ours import Ours
from recipes import TITLES, Case

HEADING = "## Beside other libraries"
# Relative root mean square from the f64 formula above which a result of ours is wrong.
WRONG = {"bf16": 2e-2, "f16": 4e-3}


def parsed(kept):
    """Cases that ran, with the records of ours and of the peers that took part."""
    for entry in kept["cases"].values():
        ours, *peers = entry["records"]
        if "ms" in ours:
            yield Case(**entry["case"]), ours, [peer for peer in peers if "ms" in peer]


def missing(kept, recipe):
    """A line for each side that did not take part for a reason, with the number of cases."""
    counts = {}
    for entry in kept["cases"].values():
        case = Case(**entry["case"])
        for record in entry["records"]:
            if "ms" not in record and case.recipe == recipe:
                why = record.get("skipped") or record.get("failed")
                key = f"{record['side']}, {case.kind} {case.passes}", why
                counts[key] = counts.get(key, 0) + 1
    return [f"* not run: {what} ({count} {'case' if count == 1 else 'cases'}): {why}" for (what, why), count in counts.items()]


def brief(records):
    def text(record):
        why = record.get("skipped") or record.get("failed")
        return f"{record['side']} " + (f"{record['ms']:.4g} ms" if "ms" in record else f"not run: {why}")

    return "; ".join(text(record) for record in records)


def bound_ms(case, about):
    """The longer of the times of the counted work at the measured rates, and whether it is that of bytes."""
    times = case.bytes() / about["bytes_per_second"], case.flops() / about["flops_per_second"]
    return 1e3 * max(times), times[0] > times[1]


def shape_of(case):
    heads = f"{case.heads}" if case.heads == case.key_heads else f"{case.heads} on {case.key_heads}"
    lengths = f"{case.length}" if case.length == case.keys else f"{case.length} of {case.keys}"
    widths = f"{case.width}" if case.width == case.value_width else f"{case.width}, {case.value_width}"
    return f"B {case.batch}, H {heads}, N {lengths}, D {widths}, {'causal' if case.causal else 'full'}"


def figure(value, digits=3):
    return "" if value is None else f"{value:.{digits}g}"


def row(case, ours, peer, about):
    """`peer` is empty if none took part."""
    bound, is_bytes = bound_ms(case, about)
    megabytes = [None if side.get("extra_bytes") is None else side["extra_bytes"] / 1e6 for side in (ours, peer)]
    cells = [
        case.kind,
        case.passes,
        shape_of(case),
        figure(ours["ms"], 4),
        f"{100 * bound / ours['ms']:.0f} % {'bytes' if is_bytes else 'flops'}",
        figure(1e3 * ours["host_ms"]),
        figure(megabytes[0]),
        figure(ours.get("error"), 2),
        peer.get("side", ""),
    ]
    if not peer:
        return [*cells, *6 * [""]]
    times = [figure(peer["ms"], 4), f"{peer['ms'] / ours['ms']:.2f}", figure(1e3 * peer["host_ms"])]
    return [*cells, *times, figure(megabytes[1]), figure(peer.get("error"), 2), figure(peer.get("from_ours"), 2)]


COLUMNS = (
    "what | pass | shape | ours ms | of bound | ours host µs | ours MB | ours error | peer "
    "| peer ms | ratio | host µs | MB | error | from ours"
)


def markdown(lines):
    return ["| " + " | ".join(line) + " |" for line in lines]


def table(header, rows):
    names = header.split(" | ")
    return [*markdown([[name.strip() for name in names], ["---"] * len(names)]), *markdown(rows), ""]


def summary(kept):
    groups = {}
    for case, ours, peers in parsed(kept):
        for peer in peers:
            key = (case.recipe, case.kind, case.passes, peer["side"])
            groups.setdefault(key, []).append((peer["ms"] / ours["ms"], shape_of(case)))
    rows = []
    for (recipe, kind, passes, side), ratios in groups.items():
        mean = math.exp(sum(math.log(ratio) for ratio, _ in ratios) / len(ratios))
        least, where = min(ratios)
        rows.append([recipe, kind, passes, side, str(len(ratios)), f"{mean:.2f}", f"{least:.2f}", where])
    return table("recipe | what | pass | peer | cases | geometric mean | least | at", rows)


def crossover(faster, slower):
    """Length from which on `faster` is: between two lengths on straight lines of logarithms."""
    lengths = sorted(set(faster) & set(slower))
    gains = [math.log(slower[length] / faster[length]) for length in lengths]
    if not gains or gains[-1] <= 0:
        return "none"
    last = max((i for i, gain in enumerate(gains) if gain <= 0), default=None)
    if last is None:
        return f"below {lengths[0]}"
    share = -gains[last] / (gains[last + 1] - gains[last])
    return f"{lengths[last] * (lengths[last + 1] / lengths[last]) ** share:.0f}"


def crossovers(kept):
    """Of our linear kinds and our fused softmax."""
    times = {}
    for case, ours, _ in parsed(kept):
        if case.recipe in "BC":
            times.setdefault((case.recipe, case.passes, case.kind), {})[case.length] = ours["ms"]
    rows = []
    for (recipe, passes, kind), line in times.items():
        softmax = times.get((recipe, passes, "softmax"))
        if kind != "softmax" and softmax:
            rows.append([recipe, passes, kind, crossover(line, softmax)])
    return table("recipe | pass | what | faster than our softmax from length", rows) if rows else []


def text(kept):
    about = kept["about"]
    lines = [
        HEADING,
        "",
        f"{about['device']}; PyTorch {about['torch']}; commit {about['commit'] or 'unknown'}; "
        "`python benches/peers/gpu.py`. Medians; a ratio is the peer's time over ours. Measured in the same run: "
        f"a copy moves {about['bytes_per_second'] / 1e12:.2f} TB/s, a large bf16 product does "
        f"{about['flops_per_second'] / 1e12:.0f} TFLOP/s. The bound is the longer of the times of counted operations "
        "and of operands and results moved once at these rates. `host µs`: what the host is busy for with one call, hidden "
        "behind other work in the times. `MB`: memory beyond operands and results. `error`: relative root mean square from the "
        "f64 formula on one head; `from ours`: between both results. The sum of FLASH's two branches is not in our times.",
        "",
        *summary(kept),
        *crossovers(kept),
    ]
    for recipe, title in TITLES.items():
        rows = [
            row(case, ours, peer, about)
            for case, ours, peers in parsed(kept)
            if case.recipe == recipe
            for peer in peers or [{}]
        ]
        absent = missing(kept, recipe)
        if rows or absent:
            lines += [f"### Recipe {recipe}: {title}", "", *table(COLUMNS, rows), *absent, *[""][: len(absent)]]
    return "\n".join(lines)


def pictures(kept):
    """Names, titles and lines; an axis of its own for each pass, width and mask of a recipe."""
    found = {}
    for case, ours, peers in parsed(kept):
        if case.kind == "linear_step":
            continue
        mask = "causal" if case.causal else "full"
        width = f"-d{case.width}" if case.recipe == "A" else ""
        name = f"peers-{case.recipe.lower()}-{case.passes}" + (f"{width}-{mask}" if case.recipe[0] == "A" else "")
        details = [case.passes, f"D {case.width}" if width else "", mask if case.recipe[0] == "A" else ""]
        title = f"{case.recipe}: {TITLES[case.recipe]}; " + ", ".join(filter(None, details))
        x = math.prod(case.shapes()[0]) if case.recipe == "D" else case.keys
        _, lines = found.setdefault(name, (title, {}))
        for side in (ours, *peers):
            lines.setdefault(f"{case.kind}: {side['side']}", []).append([x, side["ms"]])
    for name, (title, lines) in found.items():
        yield name, title, [[label, sorted(points)] for label, points in lines.items()]


def write(folder, kept, ours):
    (folder / "peers.md").write_text(text(kept) + "\n")
    for name, title, lines in pictures(kept):
        x = "elements of q" if name.startswith("peers-d-") else "length (tokens)"
        ours.plot(folder / f"{name}.svg", title, lines, x=x)
    print(f"wrote {folder}/peers.md and pictures")


def failures(kept):
    """What is wrong with our results, and where there are none."""
    failed = [
        f"{name}: {entry['records'][0]['failed']}"
        for name, entry in kept["cases"].items()
        if "failed" in entry["records"][0]
    ]
    wrong = [
        f"{case.name}: our error is {ours['error']:.2g}"
        for case, ours, _ in parsed(kept)
        if not ours.get("error", 0) <= WRONG[case.dtype]
    ]
    return failed + wrong


def put(path, section):
    """Replaces the section of the heading, or adds it."""
    old = path.read_text() if path.exists() else f"# {path.stem}\n"
    pattern = re.compile(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    new, count = pattern.subn(lambda _: section + "\n", old)
    path.write_text(new if count else old.rstrip("\n") + "\n\n" + section + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--into", type=pathlib.Path)
    parser.add_argument("--program", help="the example peer_bench, if it is built already")
    args = parser.parse_args()
    kept = json.loads((args.folder / "records.json").read_text())
    ours = Ours(args.program)
    write(args.folder, kept, ours)
    ours.close()
    if args.into:
        put(args.into, text(kept))


if __name__ == "__main__":
    main()
