#!/usr/bin/env python3
"""One mixture-of-experts step the way the research plan describes it, in plain NumPy, and how long it takes.

Written anew from the plan's description, not from its code: 8 sequences of 32 tokens, hidden width 256, 8 experts of width
1024, 2 per token. Every token, one at a time, looks at its 7 nearest neighbours, plays 100 iterations of best response
against them with the three flocking terms (separation from crowded experts, alignment with what neighbours do on average, cohesion
with what the nearest one does), asks a dictionary `state -> solution` first, and is then sent through its 2 experts alone. Nothing is batched:
that is what makes it slow, and what the plan wants to get rid of.

With PyTorch installed, a dense layer with as many active parameters is timed too. With `--compare FILE`, FILE being what
`nashswarm bench routing --json FILE` wrote, prints how many times faster each row is.
"""

import argparse
import json
import statistics
import time

import numpy as np

BATCH, LENGTH, WIDTH, HIDDEN = 8, 32, 256, 1024
EXPERTS, TOP_K, NEIGHBOURS, ITERATIONS = 8, 2, 7, 100
SEPARATION, ALIGNMENT, COHESION, RATE = 1.0, 0.3, 0.2, 0.1


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


class Prototype:
    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        scale = 1 / np.sqrt(WIDTH)
        self.router = rng.normal(0, scale, (EXPERTS, WIDTH)).astype(np.float32)
        self.up = rng.normal(0, scale, (EXPERTS, HIDDEN, WIDTH)).astype(np.float32)
        self.down = rng.normal(0, 1 / np.sqrt(HIDDEN), (EXPERTS, WIDTH, HIDDEN)).astype(np.float32)
        self.cache = {}

    def neighbours(self, token, tokens):
        distance = np.linalg.norm(tokens - tokens[token], axis=1)
        return np.argsort(distance)[1 : NEIGHBOURS + 1]

    def equilibrium(self, scores, around):
        """The mixed strategy [EXPERTS] of one token against those of its neighbours [7, EXPERTS], nearest first."""
        strategy = softmax(scores)
        for _ in range(ITERATIONS):
            crowd = (around.sum(axis=0) + strategy) / (len(around) + 1)
            payoff = scores - SEPARATION * crowd
            payoff = payoff + ALIGNMENT * around.mean(axis=0) + COHESION * around[0]
            best = np.zeros(EXPERTS)
            best[int(np.argmax(payoff))] = 1.0
            new = (1 - RATE) * strategy + RATE * best
            new = new / new.sum()
            self.change = float(np.abs(new - strategy).max())
            strategy = new
        return strategy

    def step(self, x):
        """Outputs for x [BATCH, LENGTH, WIDTH]."""
        tokens = x.reshape(-1, WIDTH)
        scores = [self.router @ token for token in tokens]
        strategies = np.stack([softmax(s) for s in scores])
        out = np.zeros_like(tokens)
        for token in range(len(tokens)):
            key = tuple(np.round(tokens[token], 3).tolist())
            if key not in self.cache:
                around = strategies[self.neighbours(token, tokens)]
                self.cache[key] = self.equilibrium(scores[token], around)
            strategy = self.cache[key]
            strategies[token] = strategy
            chosen = np.argsort(-strategy)[:TOP_K]
            gates = strategy[chosen] / strategy[chosen].sum()
            for expert, gate in zip(chosen.tolist(), gates.tolist()):
                inner = np.maximum(self.up[expert] @ tokens[token], 0)
                out[token] += gate * (self.down[expert] @ inner)
        return out.reshape(x.shape)


def milliseconds(step, runs):
    """Median time of `step(run)`, after one run that is not counted."""
    times = []
    for run in range(runs + 1):
        start = time.perf_counter()
        step(run)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def torch_dense(runs, threads):
    """Milliseconds of PyTorch's dense layer with as many active parameters, or None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    if threads:
        torch.set_num_threads(threads)
    layer = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, TOP_K * HIDDEN, bias=False),
        torch.nn.ReLU(),
        torch.nn.Linear(TOP_K * HIDDEN, WIDTH, bias=False),
    )
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.inference_mode():
        return milliseconds(lambda _: layer(x), runs)


def compare(path, prototype, dense):
    with open(path) as file:
        rows = [row for row in json.load(file)["rows"] if row["shape"] == "plan"]
    print(f"\n{'step':45} {'ms':>10} {'times faster':>13}")
    rows = [{"method": "prototype, re-created", "milliseconds": prototype}, *rows]
    if dense is not None:
        rows.append({"method": "PyTorch, dense layer", "milliseconds": dense})
    for row in rows:
        print(f"{row['method']:45} {row['milliseconds']:10.4f} {prototype / row['milliseconds']:13.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="steps timed (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--compare", metavar="FILE", help="what `nashswarm bench routing --json FILE` wrote")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed + 1)
    prototype = Prototype(args.seed)
    # New tokens every time: the dictionary would otherwise answer from the second step on.
    batches = rng.normal(size=(args.runs + 1, BATCH, LENGTH, WIDTH)).astype(np.float32)
    step = milliseconds(lambda run: prototype.step(batches[run]), args.runs)
    dense = torch_dense(20 * args.runs, args.threads)
    print(f"prototype, re-created: {step:.1f} ms per step (median of {args.runs})")
    if dense is not None:
        print(f"PyTorch's dense layer with as many active parameters: {dense:.2f} ms")
    if args.compare:
        compare(args.compare, step, dense)


if __name__ == "__main__":
    main()
