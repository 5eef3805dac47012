"""lilliput: a trained neural network in, a many times smaller and faster one out, with the measured proof.

The public names, in reading order. They are imported when first used, so that `import lilliput` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    # the main job
    "shrink": "lilliput.search.shrink",
    "Result": "lilliput.search.finish",
    "load": "lilliput.export.pack",
    "run": "lilliput.workshop",
    # the engine
    "compile": "lilliput.engine.compile",
    "Engine": "lilliput.engine.run",
    # the nouns
    "Task": "lilliput.task",
    "Code": "lilliput.code.base",
    "Stage": "lilliput.stage",
    "Rule": "lilliput.rule",
    "Recipe": "lilliput.recipe",
    "Reference": "lilliput.stage",
    "Store": "lilliput.store",
    "Train": "lilliput.train",
    # codes
    "attach": "lilliput.code.base",
    "realize": "lilliput.code.base",
    "build": "lilliput.code.base",
    "codes": "lilliput.code.base",
    "storage": "lilliput.code.base",
    "Masked": "lilliput.code.masked",
    "Uniform": "lilliput.quant.uniform",
    "Half": "lilliput.quant.half",
    "LowRank": "lilliput.code.low_rank",
    # methods
    "Prune": "lilliput.prune.prune",
    "Rounds": "lilliput.prune.rounds",
    "PruneToBudget": "lilliput.prune.budget",
    "SparseGPT": "lilliput.prune.sparsegpt",
    "OBC": "lilliput.prune.obc",
    "Reconstruct": "lilliput.prune.reconstruct",
    "WoodFisher": "lilliput.prune.woodfisher",
    "StaticSparse": "lilliput.prune.sparse",
    "SET": "lilliput.prune.sparse",
    "RigL": "lilliput.prune.rigl",
    "STE": "lilliput.prune.ste",
    "ACDC": "lilliput.prune.acdc",
    "TopKAST": "lilliput.prune.topkast",
    "Movement": "lilliput.prune.movement",
    "STR": "lilliput.prune.soft_threshold",
    "L0": "lilliput.prune.l0",
    "Growing": "lilliput.prune.growing",
    "Lottery": "lilliput.prune.lottery",
    "PruneChannels": "lilliput.prune.channels",
    "PruneHeads": "lilliput.prune.heads",
    "Seam": "lilliput.prune.seam",
    "Noise": "lilliput.prune.noise",
    "Quantize": "lilliput.quant.quantize",
    "QuantizeActivations": "lilliput.quant.activations",
    "Factorize": "lilliput.factor.svd",
    "Distill": "lilliput.distill.logits",
    "Features": "lilliput.distill.features",
    "FoldBatchNorm": "lilliput.graph.stages",
    "Student": "lilliput.graph.stages",
    # schedules
    "Cosine": "lilliput.schedule",
    "Cubic": "lilliput.schedule",
    "Cyclic": "lilliput.schedule",
    "Linear": "lilliput.schedule",
    "Once": "lilliput.schedule",
    "Steps": "lilliput.schedule",
    # failures
    "FloorNotMet": "lilliput.errors",
    "NotSupported": "lilliput.errors",
    "ExportError": "lilliput.errors",
    "StoreError": "lilliput.errors",
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'lilliput' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from lilliput.code.base import Code as Code
    from lilliput.code.base import attach as attach
    from lilliput.code.base import build as build
    from lilliput.code.base import codes as codes
    from lilliput.code.base import realize as realize
    from lilliput.code.base import storage as storage
    from lilliput.code.low_rank import LowRank as LowRank
    from lilliput.code.masked import Masked as Masked
    from lilliput.distill.features import Features as Features
    from lilliput.distill.logits import Distill as Distill
    from lilliput.engine.compile import compile as compile
    from lilliput.engine.run import Engine as Engine
    from lilliput.errors import ExportError as ExportError
    from lilliput.errors import FloorNotMet as FloorNotMet
    from lilliput.errors import NotSupported as NotSupported
    from lilliput.errors import StoreError as StoreError
    from lilliput.export.pack import load as load
    from lilliput.factor.svd import Factorize as Factorize
    from lilliput.graph.stages import FoldBatchNorm as FoldBatchNorm
    from lilliput.graph.stages import Student as Student
    from lilliput.prune.acdc import ACDC as ACDC
    from lilliput.prune.budget import PruneToBudget as PruneToBudget
    from lilliput.prune.channels import PruneChannels as PruneChannels
    from lilliput.prune.growing import Growing as Growing
    from lilliput.prune.heads import PruneHeads as PruneHeads
    from lilliput.prune.l0 import L0 as L0
    from lilliput.prune.lottery import Lottery as Lottery
    from lilliput.prune.movement import Movement as Movement
    from lilliput.prune.noise import Noise as Noise
    from lilliput.prune.obc import OBC as OBC
    from lilliput.prune.prune import Prune as Prune
    from lilliput.prune.reconstruct import Reconstruct as Reconstruct
    from lilliput.prune.rigl import RigL as RigL
    from lilliput.prune.rounds import Rounds as Rounds
    from lilliput.prune.seam import Seam as Seam
    from lilliput.prune.soft_threshold import STR as STR
    from lilliput.prune.sparse import SET as SET
    from lilliput.prune.sparse import StaticSparse as StaticSparse
    from lilliput.prune.sparsegpt import SparseGPT as SparseGPT
    from lilliput.prune.ste import STE as STE
    from lilliput.prune.topkast import TopKAST as TopKAST
    from lilliput.prune.woodfisher import WoodFisher as WoodFisher
    from lilliput.quant.activations import QuantizeActivations as QuantizeActivations
    from lilliput.quant.half import Half as Half
    from lilliput.quant.quantize import Quantize as Quantize
    from lilliput.quant.uniform import Uniform as Uniform
    from lilliput.recipe import Recipe as Recipe
    from lilliput.rule import Rule as Rule
    from lilliput.schedule import Cosine as Cosine
    from lilliput.schedule import Cubic as Cubic
    from lilliput.schedule import Cyclic as Cyclic
    from lilliput.schedule import Linear as Linear
    from lilliput.schedule import Once as Once
    from lilliput.schedule import Steps as Steps
    from lilliput.search.finish import Result as Result
    from lilliput.search.shrink import shrink as shrink
    from lilliput.stage import Reference as Reference
    from lilliput.stage import Stage as Stage
    from lilliput.store import Store as Store
    from lilliput.task import Task as Task
    from lilliput.train import Train as Train
    from lilliput.workshop import run as run
