"""Post-training points: the network as it is, in fewer bits and narrower arithmetic, without a training step."""

from typing import TYPE_CHECKING

from torch import nn

from lilliput.errors import ExportError, NotSupported
from lilliput.graph.fold import fold_batchnorm
from lilliput.quant.quantize import Quantize
from lilliput.recipe import Recipe, plain
from lilliput.search.points import Point

if TYPE_CHECKING:
    from lilliput.search.shrink import Search


def points(search: "Search") -> list[Point]:
    """The dense network with 8-bit weights."""
    found: list[Point] = []
    folded = fold_batchnorm(search.model, search.task.example)
    for stage in (Quantize(8),):
        recipe = Recipe((stage,))
        try:
            with search.clock.on("calibrate"):
                model: nn.Module = stage(folded, search.task, search.shop.reference)
            found.append(search.press.point(model, "dense", f"same structure, {stage.bits} bits without training",
                                            [{"stage": "FoldBatchNorm"}, plain(stage)], search.shop.key(recipe)))
        except (ExportError, NotSupported, ValueError) as error:
            search.tried.append({"kind": "point", "status": "failed", "name": f"{stage.bits} bits", "reason": str(error)})
    return found


