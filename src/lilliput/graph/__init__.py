"""Changing a network's graph: channels and blocks that really go, earlier strides, folded batch norm, students."""

from lilliput.graph.blocks import PassThrough, removable, remove_blocks, skipped_blocks
from lilliput.graph.channels import groups, remove_channels
from lilliput.graph.fold import fold_batchnorm
from lilliput.graph.group import Group, Part, choose, skipped
from lilliput.graph.stride import earlier_stride, set_stride
from lilliput.graph.students import reset, student
from lilliput.graph.trace import Skipped
from lilliput.graph.widths import Size, Sizes, kept, magnitude, rounded, taylor, uniform, widths

__all__ = [
    "Group",
    "Part",
    "PassThrough",
    "Size",
    "Sizes",
    "Skipped",
    "choose",
    "earlier_stride",
    "fold_batchnorm",
    "groups",
    "kept",
    "magnitude",
    "removable",
    "remove_blocks",
    "remove_channels",
    "reset",
    "rounded",
    "set_stride",
    "skipped",
    "skipped_blocks",
    "student",
    "taylor",
    "uniform",
    "widths",
]
