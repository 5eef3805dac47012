"""Explain the terms of a report: one sentence or two each, shown as tooltips and listed at the end of the page."""

from __future__ import annotations

TERMS = {
    "floor": ("floor", "What may be lost against the dense network, in points of the metric or in its own unit."),
    "point of a metric": (
        "points",
        "A point is 0.01 of a metric: an accuracy that falls from 98% to 97% loses 1 point.",
    ),
    "dense": ("dense", "The network as it was given. All factors compare with its ONNX file in ONNX Runtime."),
    "point": ("point", "One finished network: its structure, how it was trained, and in how many bits it is stored."),
    "front": ("on the front", "A point that no other point beats in its score and in every cost that was asked for."),
    "near miss": ("nearest miss", "A cheaper point that might lose more than the floor, and the floor that allows it."),
    "loss": ("loss", "How much worse the score is than the dense network's; negative where it is better."),
    "validation": (
        "validation, as chosen",
        "The loss that was seen on the validation split. It looks a little too good: the best of many points is also "
        "the one whose examples happened to suit it.",
    ),
    "corrected": (
        "validation, corrected for the choice",
        "The loss to be expected on new data: the luck of having been the best of many points is taken off.",
    ),
    "test": ("test, read once", "The loss on the test split, which no decision has read."),
    "interval": ("95% interval", "The range that holds the loss on new data with a probability of 95%."),
    "bound": (
        "at most",
        "The most that is lost on new data, with the probability that --sure asks for. The floor is checked on this.",
    ),
    "lil": ("model.lil", "The network packed bit by bit. lilliput.load reads it; no runtime is needed."),
    "onnx": ("model.onnx", "The network as ONNX Runtime and other runtimes read it. Its integers have 4 or 8 bits."),
    "latency": (
        "latency",
        "The median time of one input in ONNX Runtime. Networks run in turns, so that they share what slows them. Not "
        "every point is timed.",
    ),
    "engine": ("in the engine", "The same in lilliput's engine: a C program whose kernels skip zeros."),
    "memory": ("memory", "The most bytes that a run needs at once: weights, inputs and what lies between layers."),
    "macs": ("multiply-adds", "Multiplications with an addition that one input takes."),
    "values": ("values", "How many numbers are stored: weights, biases and tables, without zeros that are left out."),
    "code": (
        "stored as",
        "How a tensor is stored: float (as it was), grid (integers), mask (nonzeros only) and others.",
    ),
    "bits": ("bits", "How many bits a stored value takes, scales and tables not counted."),
    "zeros": ("zeros", "The sparsity: the fraction of a tensor's values that is zero."),
    "rank": ("rank", "The inner size where a tensor is stored as a product of two smaller ones."),
    "share": ("share of time", "The layer's part of the time of one run."),
    "axis": (
        "axis",
        "One way in which attempts differ, mostly a technique. An attempt that varies several counts for each of them; "
        "untrained means fewer bits without training, labels means that training follows the labels.",
    ),
    "gain": ("gain", "How many times smaller (faster, ...) the best point became by it."),
    "rate": ("log gain a minute", "The natural logarithm of the gain, divided by the minutes that it took."),
    "enough": (
        "examples needed",
        "About how many validation examples might show that the point keeps the floor as asked.",
    ),
    "left alone": ("left alone", "A layer or a method that the search could not change, with the reason."),
    "load": (
        "Load",
        "How many processes wanted a processor core. More than there are cores makes latencies uncertain.",
    ),
    "agreement": (
        "Agreement with torch",
        "How far the outputs of model.onnx are from those of the same network in torch.",
    ),
}
"""Key -> (how the page writes it, what it means)."""
