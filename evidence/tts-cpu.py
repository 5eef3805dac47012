"""Text-to-speech on one core (2020): a block-sparse recurrent vocoder makes audio faster than it is played.

A GRU draws one sample of 8 kHz speech at a time, mu-law in 256 levels, from the sample before and from what the frame
of 10 ms sounds like (20 mel bands, pitch). It is trained dense, trained with zeros that grow in blocks of 16x1, and
trained with as few units as the zeros leave weights: each for the same steps, from nothing, on real speech. The engine
compiles the step of one sample; the loop over samples is C and is compiled with it. The full size trains for forty
minutes of one core, once: trainings are kept in the cache.

Sources: Q. He, Z. Xiu, T. Koehler, J. Wu, A highly efficient, real-time text-to-speech system deployed on CPUs,
Facebook AI blog, May 2020; N. Kalchbrenner et al., Efficient neural audio synthesis, ICML 2018, arXiv:1802.08435
(WaveRNN: large and sparse against small and dense); J.-M. Valin and J. Skoglund, LPCNet, ICASSP 2019, arXiv:1810.11846
(what the sample before adds is a table; frames are computed apart from samples).
"""

import ctypes
import json
import math
import tempfile
import time
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput.data import cache_folder
from lilliput.engine.build import library
from lilliput.engine.target import target
from lilliput.export.onnx import Session

RATE, FRAME, BANDS, LEVELS = 8000, 80, 20, 256
SPEECH = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
Array = np.ndarray[Any, Any]


# --------------------------------------------------------------------------------------------------------------- data


def speech() -> list[Array]:
    """Every recording of the Debian package, in [-1, 1): 25 minutes of one voice at 8 kHz."""
    files = sorted(SPEECH.rglob("*.wav"))
    if not files:
        raise ImportError(
            f"tts-cpu: recorded speech must be in {SPEECH}, and is not. "
            "Run: apt-get install asterisk-core-sounds-en-wav"
        )
    sounds = []
    for file in files:
        with wave.open(str(file)) as sound:
            sounds.append(np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768)
    return [sound for sound in sounds if len(sound) >= 20 * FRAME]


def vowels(count: int, seconds: float) -> list[Array]:
    """Synthesised vowels, for where no speech is installed: pulses at a gliding pitch through three resonances."""
    draw, sounds, length = np.random.default_rng(0), [], int(seconds * RATE)
    formants = np.array([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]])
    frequency = np.fft.rfftfreq(2 * length, 1 / RATE)
    for _ in range(count):
        pitch = np.linspace(*draw.uniform(90, 240, 2), length)
        pulses = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0) + 0.01 * draw.standard_normal(length)
        spectrum = np.fft.rfft(pulses, 2 * length)
        for centre in draw.permutation(formants)[0]:
            spectrum /= 1 - (frequency / centre) ** 2 + 1j * frequency / (8 * centre)
        sound = np.fft.irfft(spectrum)[:length]
        sounds.append((0.5 * sound / np.abs(sound).max()).astype(np.float32))
    return sounds


def encoded(sound: Array) -> Array:
    """Mu-law levels 0 to 255 of samples in [-1, 1]."""
    squeezed = np.sign(sound) * np.log1p(255 * np.abs(sound)) / math.log(256)
    return np.clip(np.floor((squeezed + 1) * 128), 0, 255).astype(np.int64)


def decoded(levels: Array) -> Array:
    """The samples in the middle of mu-law levels."""
    squeezed = (levels + 0.5) / 128 - 1
    return (np.sign(squeezed) * (256 ** np.abs(squeezed) - 1) / 255).astype(np.float32)


def spectra(sound: Array) -> tuple[Array, Array]:
    """Windows of 32 ms around each whole frame: their power spectra (frames, 129) and the windows (frames, 256)."""
    frames = len(sound) // FRAME
    padded = np.pad(sound, (88, 88 + FRAME))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 256)[: frames * FRAME : FRAME] * np.hanning(256)
    return np.abs(np.fft.rfft(windows)) ** 2, windows


def mel() -> Array:
    """(129, BANDS) triangles evenly spaced in mel from 50 Hz to 4 kHz."""
    edges = 700 * np.expm1(np.linspace(math.log1p(50 / 700), math.log1p(4000 / 700), BANDS + 2))
    f = np.linspace(0, RATE / 2, 129)[:, None]
    return np.clip(np.minimum((f - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - f) / np.diff(edges)[1:]), 0, None)


def loudness(sound: Array) -> Array:
    """(frames, BANDS): log10 of the energy in each mel band."""
    return np.log10(spectra(sound)[0] @ mel() + 1e-5)


def features(sound: Array) -> Array:
    """(frames, BANDS + 2) float32: loudness, and the lag and height of the highest autocorrelation (the pitch)."""
    windows = spectra(sound)[1]
    power = np.abs(np.fft.rfft(windows, 512)) ** 2
    lags = np.fft.irfft(power)[:, 20:160] / (power.mean(1, keepdims=True) + 1e-6) / (1 - np.arange(20, 160) / 256)
    return np.concatenate([loudness(sound) / 2 + 1, lags.argmax(1)[:, None] / 70 - 1, lags.max(1)[:, None]], 1,
                          dtype=np.float32)  # fmt: skip


def chunks(sounds: list[Array], frames: int) -> tuple[tuple[Array, Array], Array]:
    """((level before each sample (n, t), features (n, frames, c)), levels (n, t)): pieces of `frames` frames each."""
    before, about, levels = [], [], []
    for sound in sounds:
        known, parts = features(sound), encoded(sound)
        shifted = np.concatenate([[LEVELS // 2], parts[:-1]])
        for first in range(0, len(known) - frames + 1, frames):
            where = slice(first * FRAME, (first + frames) * FRAME)
            before.append(shifted[where])
            levels.append(parts[where])
            about.append(known[first : first + frames])
    return (np.stack(before), np.stack(about)), np.stack(levels)


# ------------------------------------------------------------------------------------------------------------ network


class Vocoder(nn.Module):
    """Levels before (n, t) and features (n, t / 80, c) to logits (n, t, 256)."""

    def __init__(self, hidden: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(BANDS + 2, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1)
        self.embed = nn.Embedding(LEVELS, width)
        self.rnn = nn.GRU(2 * width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, LEVELS)

    def frames(self, about: Tensor) -> Tensor:
        """(n, frames, c) -> (n, frames, width): what the samples of a frame are told."""
        return self.conv2(self.conv1(about.transpose(1, 2)).tanh()).tanh().transpose(1, 2)

    def forward(self, before: Tensor, about: Tensor) -> Tensor:
        told = self.frames(about).repeat_interleave(FRAME, 1)
        out, _ = self.rnn(torch.cat([self.embed(before), told], -1))
        logits: Tensor = self.head(out)
        return logits


def nats(output: Tensor, target: Tensor) -> Tensor:
    """The mean cross entropy of the levels."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def bits(output: Tensor, target: Tensor) -> Tensor:
    """Bits a sample, by example."""
    return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1) / math.log(2)


def trained(task: lilliput.Task, hidden: int, steps: int, sparsity: float, store: Path | None) -> Vocoder:
    """A network trained from nothing; with a sparsity, blocks of 16 outputs go by their mean magnitude meanwhile."""
    torch.manual_seed(0)
    prune = lilliput.Prune(
        lilliput.Cubic(sparsity, begin=0.1, end=0.7),
        pattern="block 16x1",
        allocation="uniform",
        where="rnn.weight_hh_l0,head.weight",
        every=10,
    )
    train = lilliput.Train(steps, lr=lilliput.Cosine(3e-3), clip=1.0, rules=(prune,) if sparsity else ())
    made = lilliput.run(Vocoder(hidden), task, lilliput.Recipe((train,)), store)
    return lilliput.realize(made)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------- as ONNX


def step(net: Vocoder, narrow: bool = False) -> onnx.ModelProto:
    """One sample: (level before (1,), told (1, 3 hidden), state (1, hidden)) -> (chances (1, 256), state).

    What the embedding adds to the gates is a table, and what the frame adds is computed once a frame (`frames`).
    narrow: both matrices in 8 bits with a scale for each output.
    """
    hidden, weights = net.rnn.hidden_size, {name: value.detach() for name, value in net.named_parameters()}
    of_level = weights["embed.weight"] @ weights["rnn.weight_ih_l0"][:, : net.embed.embedding_dim].T
    arrays = {
        "table": of_level,
        "recurrent": weights["rnn.weight_hh_l0"],
        "recurrent_bias": weights["rnn.bias_hh_l0"],
        "head": weights["head.weight"],
        "head_bias": weights["head.bias"],
    }
    node, widened = onnx.helper.make_node, []
    for name in ("recurrent", "head") if narrow else ():
        weight = arrays.pop(name)
        scale = weight.abs().amax(1) / 127
        arrays |= {f"{name}_codes": (weight / scale[:, None]).round().to(torch.int8), f"{name}_scale": scale}
        widened.append(node("DequantizeLinear", [f"{name}_codes", f"{name}_scale"], [name], axis=0))
    nodes = [
        *widened, node("Gather", ["table", "level"], ["known"]), node("Add", ["known", "told"], ["x"]),
        node("Gemm", ["state", "recurrent", "recurrent_bias"], ["u"], transB=1),
        node("Split", ["x"], ["x_r", "x_z", "x_n"], axis=1, num_outputs=3),
        node("Split", ["u"], ["u_r", "u_z", "u_n"], axis=1, num_outputs=3),
        node("Add", ["x_r", "u_r"], ["a_r"]), node("Sigmoid", ["a_r"], ["r"]),
        node("Add", ["x_z", "u_z"], ["a_z"]), node("Sigmoid", ["a_z"], ["z"]),
        node("Mul", ["r", "u_n"], ["reset"]), node("Add", ["x_n", "reset"], ["a_n"]), node("Tanh", ["a_n"], ["n"]),
        node("Sub", ["state", "n"], ["apart"]), node("Mul", ["z", "apart"], ["kept"]),
        node("Add", ["n", "kept"], ["next_state"]),
        node("Gemm", ["next_state", "head", "head_bias"], ["logits"], transB=1),
        node("Softmax", ["logits"], ["chances"], axis=-1),
    ]  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    return _model(
        nodes,
        [value("level", onnx.TensorProto.INT64, [1]), value("told", onnx.TensorProto.FLOAT, [1, 3 * hidden]),
         value("state", onnx.TensorProto.FLOAT, [1, hidden])],
        [value("chances", onnx.TensorProto.FLOAT, [1, LEVELS]),
         value("next_state", onnx.TensorProto.FLOAT, [1, hidden])],
        arrays,
    )  # fmt: skip


def frames(net: Vocoder, most: int) -> onnx.ModelProto:
    """What each frame adds to the gates: features (1, c, frames) -> (frames, 3 hidden), for `most` frames."""
    weights = {name: value.detach() for name, value in net.named_parameters()}
    told = weights["rnn.weight_ih_l0"][:, net.embed.embedding_dim :]
    arrays = {f"{conv}.{part}": weights[f"{conv}.{part}"] for conv in ("conv1", "conv2") for part in ("weight", "bias")}
    arrays |= {"told": told, "told_bias": weights["rnn.bias_ih_l0"]}
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["about", "conv1.weight", "conv1.bias"], ["a"], pads=[1, 1]), node("Tanh", ["a"], ["b"]),
        node("Conv", ["b", "conv2.weight", "conv2.bias"], ["c"], pads=[1, 1]), node("Tanh", ["c"], ["d"]),
        node("Squeeze", ["d", "zero"], ["e"]),
        node("Transpose", ["e"], ["f"], perm=[1, 0]), node("Gemm", ["f", "told", "told_bias"], ["gates"], transB=1),
    ]  # fmt: skip
    arrays["zero"] = torch.zeros(1, dtype=torch.int64)
    value = onnx.helper.make_tensor_value_info
    return _model(nodes, [value("about", onnx.TensorProto.FLOAT, [1, BANDS + 2, most])],
                  [value("gates", onnx.TensorProto.FLOAT, [most, 3 * net.rnn.hidden_size])], arrays)  # fmt: skip


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], arrays: dict[str, Tensor]) -> onnx.ModelProto:
    kept = [onnx.numpy_helper.from_array(array.contiguous().numpy(), name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "vocoder", inputs, outputs, kept)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


# ------------------------------------------------------------------------------------------------------------ speaking


LOOP = """
#include <math.h>
#include "model.h"

/* Draws levels[0..samples) and returns their bits; with `given` the levels are read instead. What has a chance below
   0.002 is not drawn: a click is heard (LPCNet, equation 8). states: two of them, the first one zero. told: what each
   frame adds to the gates. */
MODEL_API double speak(void *arena, const void *weights, const float *told, float *states, uint64_t seed, int given,
                       int64_t samples, int64_t *levels)
{
    float chances[LEVELS], above[LEVELS];
    int64_t before = LEVELS / 2;
    double bits = 0;
    model_call call = {.arena = arena, .weights = weights, .level = &before, .chances = chances};
    for (int64_t t = 0; t < samples; t++) {
        call.told = told + t / FRAME * (3 * HIDDEN);
        call.state = states + (t & 1) * HIDDEN;
        call.next_state = states + (~t & 1) * HIDDEN;
        model_run(&call);
        if (!given) {
            float total = 0;
            for (int i = 0; i < LEVELS; i++)
                total += above[i] = chances[i] > 0.002f ? chances[i] - 0.002f : 0;
            seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
            float left = (float)(seed >> 40) * 0x1p-24f * total;
            levels[t] = 0;
            while (levels[t] < LEVELS - 1 && (left -= above[levels[t]]) >= 0)
                levels[t]++;
        }
        before = levels[t];
        bits -= log2f(chances[before] + 1e-9f);
    }
    return bits;
}
"""


@dataclass
class Voice:
    """A compiled vocoder: `told` says what frames add to the gates, `speak` draws samples or rates given ones."""

    net: Vocoder
    folder: Path
    most: int
    narrow: bool
    tune: bool

    def __post_init__(self) -> None:
        self.proto = step(self.net, self.narrow)
        self.engine = lilliput.compile(self.proto, self.folder / "step", tune=self.tune)
        self.frames = lilliput.compile(frames(self.net, self.most), self.folder / "frames", tune=self.tune)
        loop = self.folder / "step" / "speak.c"
        loop.write_text(f'#include "model.c"\n{LOOP}', encoding="utf-8")
        sizes = [f"-DLEVELS={LEVELS}", f"-DFRAME={FRAME}", f"-DHIDDEN={self.net.rnn.hidden_size}"]
        library(loop, self.folder / "step" / "libspeak.so", target(), sizes)
        self._speak = ctypes.CDLL(str(self.folder / "step" / "libspeak.so")).speak
        self._speak.restype = ctypes.c_double
        self._speak.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]
        held = json.loads((self.folder / "step" / "manifest.json").read_text(encoding="utf-8"))
        self._arena, self._weights = aligned(np.zeros(held["arena_bytes"], np.uint8)), None
        if held["weight_bytes"]:
            self._weights = aligned(np.fromfile(self.folder / "step" / "model.weights", np.uint8))

    @property
    def size_bytes(self) -> int:
        """What speaking needs on disk: the library of the step and the loop, and the weights where they lie beside."""
        files = (self.folder / "step" / name for name in ("libspeak.so", "model.weights"))
        return sum(file.stat().st_size for file in files if file.exists())

    def told(self, about: Array) -> Array:
        """(frames, c) -> (frames, 3 hidden), a second at a time; pieces overlap by what the convolutions see."""
        padded, parts = np.pad(about, ((2, self.most), (0, 0))), []
        for first in range(0, len(about), self.most - 4):
            parts.append(self.frames(padded[None, first : first + self.most].transpose(0, 2, 1))[2:-2])
        return np.ascontiguousarray(np.concatenate(parts)[: len(about)])

    def speak(self, told: Array, levels: Array | None = None, seed: int = 1) -> tuple[Array, float]:
        """(levels (frames * 80,), bits a sample): drawn, or those that are given."""
        made = np.zeros(len(told) * FRAME, np.int64) if levels is None else np.ascontiguousarray(levels, np.int64)
        states = np.zeros((2, self.net.rnn.hidden_size), np.float32)
        weights = None if self._weights is None else self._weights.ctypes.data
        spent = self._speak(
            self._arena.ctypes.data,
            weights,
            told.ctypes.data,
            states.ctypes.data,
            seed * 0x9E3779B97F4A7C15 % 2**64,
            levels is not None,
            len(made),
            made.ctypes.data,
        )
        return made, spent / len(made)


def aligned(array: Array) -> Array:
    """A copy of bytes that begins at a multiple of 64."""
    room = np.empty(len(array) + 64, np.uint8)
    first = -room.ctypes.data % 64
    room[first : first + len(array)] = array
    return room[first : first + len(array)]


# ------------------------------------------------------------------------------------------------------------- measure


def nonzeros(proto: onnx.ModelProto) -> tuple[int, int]:
    """(non-zero weights, weights) that a sample is multiplied by: the table is looked up."""
    names = ("recurrent", "head", "recurrent_codes", "head_codes")
    kept = [onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name in names]
    return sum(int(np.count_nonzero(w)) for w in kept), sum(w.size for w in kept)


def apart(made: Array, sound: Array) -> float:
    """How far the loudness of two sounds is apart: decibels, root mean square over the bands, mean over the frames."""
    frames = len(made) // FRAME
    difference = 10 * (loudness(made)[:frames] - loudness(sound)[:frames])
    return float(np.sqrt(np.square(difference).mean(1)).mean())


def checked(voice: Voice, told: Array, levels: Array) -> float:
    """The largest difference of the chances from ONNX Runtime's over some samples, each going on with its own state."""
    session, shape, worst = Session(voice.proto), (1, voice.net.rnn.hidden_size), 0.0
    a, b = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for t in range(len(levels) - 1):
        inputs = (levels[t : t + 1], told[t // FRAME : t // FRAME + 1])
        (mine, a), (theirs, b) = voice.engine(*inputs, a), session.all((*inputs, b))
        worst = max(worst, float(np.abs(mine - theirs).max()))
    return worst


def times(voices: dict[str, Voice], told: dict[str, Array], about: Array, rounds: int) -> dict[str, dict[str, float]]:
    """Processor seconds a second of audio, medians of `rounds` in which all take turns; the engine and ONNX Runtime.

    A turn is a tenth of a second, with its share of the frames' network; for ONNX Runtime one call after the other with
    the same inputs, without what Python does between them.
    """
    sessions, feeds = {}, {}
    for name, voice in voices.items():
        sessions[name] = Session(voice.proto)
        state = np.zeros((1, voice.net.rnn.hidden_size), np.float32)
        feeds[name] = sessions[name].feed((np.array([128]), told[name][:1], state))
    spent: dict[str, dict[str, list[float]]] = {name: {"engine": [], "onnxruntime": []} for name in voices}
    for _ in range(rounds + 1):
        for name, voice in voices.items():
            began = time.process_time()
            voice.speak(told[name][:10])
            loop = time.process_time() - began
            began = time.process_time()
            voice.frames(about)
            framed = (time.process_time() - began) * 10 / voice.most
            spent[name]["engine"].append((loop + framed) * 10)
            began = time.process_time()
            for _ in range(FRAME):
                sessions[name].run(feeds[name])
            spent[name]["onnxruntime"].append((time.process_time() - began) * RATE / FRAME)
    return {name: {which: float(np.median(kept[1:])) for which, kept in found.items()} for name, found in spent.items()}


def smaller(hidden: int, sparsity: float) -> int:
    """Units h, a multiple of 16, of a dense network with the weights that zeros leave: 3 h^2 + 256 h of them."""
    weights = (1 - sparsity) * (3 * hidden**2 + LEVELS * hidden)
    return max(16 * round((math.sqrt(weights / 3 + (LEVELS / 6) ** 2) - LEVELS / 6) / 16), 16)


def measure(quick: bool) -> dict[str, Any]:
    """A row for each network: what it costs to speak, and how well it knows and imitates speech that it never heard."""
    torch.set_num_threads(1)
    sounds = vowels(24, 1.0) if quick else speech()
    pieces, steps, hidden = (2, 20, 48) if quick else (10, 500, 384)
    heard = [sound for i, sound in enumerate(sounds) if i % 20]
    unheard = [sound[: 4 * RATE] for sound in sounds[::20]]
    data = chunks(heard, pieces)
    task = lilliput.Task("speech", train=data, val=chunks(unheard, pieces), loss=nats, metric=bits,
                         higher_is_better=False, batch_size=16 if quick else 32)  # fmt: skip
    sparsity, small = 0.9, smaller(hidden, 0.9)
    plan = {"dense": (hidden, 0.0, False), "90% zeros, blocks of 16x1": (hidden, sparsity, False),
            "90% zeros, 8 bits": (hidden, sparsity, True), "small and dense": (small, 0.0, False)}  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        store = cache_folder() / "evidence" if not quick else Path(scratch, "store")
        most = 2 * pieces + 4
        voices = {}
        for name, (size, zeros, narrow) in plan.items():
            net = trained(task, size, steps, zeros, store)
            voices[name] = Voice(net, Path(scratch, name), most, narrow, tune=not quick)
        known = [features(sound) for sound in unheard]
        spoken = {name: [voice.told(about) for about in known] for name, voice in voices.items()}
        about = np.ascontiguousarray(np.resize(known[0], (1, most, BANDS + 2)).transpose(0, 2, 1))
        seconds = times(voices, {name: told[0] for name, told in spoken.items()}, about, 5 if quick else 40)
        for name, voice in voices.items():
            levels = [encoded(sound[: len(told) * FRAME]) for sound, told in zip(unheard, spoken[name], strict=True)]
            rated = [voice.speak(told, given)[1] for told, given in zip(spoken[name], levels, strict=True)]
            made = [decoded(voice.speak(told, seed=i + 1)[0]) for i, told in enumerate(spoken[name])]
            kept, all_ = nonzeros(voice.proto)
            factor, other = seconds[name]["engine"], seconds[name]["onnxruntime"]
            rows.append({
                "network": name, "units": voice.net.rnn.hidden_size, "weights": all_, "nonzero": kept,
                "real_time_factor": round(factor, 4), "times_real_time": round(1 / factor, 2),
                "onnxruntime_real_time_factor": round(other, 4), "ratio": round(other / factor, 2),
                "bits_per_sample": round(float(np.average(rated, weights=list(map(len, levels)))), 4),
                "spectrum_apart_db": round(_mean_apart(made, unheard), 3),
                "largest_difference": float(f"{checked(voice, spoken[name][0], levels[0][:400]):.2g}"),
                "program_bytes": voice.size_bytes,
            })  # fmt: skip
    return {
        "claim": "a block-sparse recurrent vocoder makes one second of audio in half a second on one core",
        "baseline": "the same network dense, and a dense one with as many weights as the zeros leave; "
                    "ONNX Runtime on the same files. real_time_factor: processor seconds of one core for a second of "
                    f"audio at {RATE} Hz",
        "data": "synthesised vowels" if quick else "asterisk-core-sounds-en-wav, every twentieth recording held out",
        "steps": steps, "spectrum_apart_db": "mel loudness of drawn from recorded speech",
        "of_recordings_in_256_levels": round(_mean_apart([decoded(encoded(s)) for s in unheard], unheard), 3),
        "of_noise_as_loud": round(_mean_apart([noise(s) for s in unheard], unheard), 3),
        "bits_by_frequency_alone": _histogram(data[1], task), "rows": rows,
    }  # fmt: skip


def noise(sound: Array) -> Array:
    """White noise with the energy of each frame of a sound."""
    pieces = sound[: len(sound) // FRAME * FRAME].reshape(-1, FRAME)
    drawn = np.random.default_rng(0).standard_normal(pieces.shape)
    return (drawn * np.sqrt(np.square(pieces).mean(1, keepdims=True))).astype(np.float32).reshape(-1)


def _mean_apart(made: list[Array], sounds: list[Array]) -> float:
    return float(np.mean([apart(mine, sound[: len(mine)]) for mine, sound in zip(made, sounds, strict=True)]))


def _histogram(levels: Array, task: lilliput.Task) -> float:
    """Bits a held-out sample costs whose level is told by its frequency alone."""
    share = (np.bincount(levels.ravel(), minlength=LEVELS) + 1) / (levels.size + LEVELS)
    held_out = task.split("val")[1]
    assert held_out is not None
    return round(float(-np.log2(share[held_out.numpy()]).mean()), 4)
