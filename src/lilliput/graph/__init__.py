"""Changing a network's graph: channels and blocks that really go, earlier strides, folded batch norm, students."""

from lilliput.graph.blocks import Skip, blocks_left, removable, remove_blocks
from lilliput.graph.channels import Group, Part, choose, groups, left, remove_channels
from lilliput.graph.fold import fold_batchnorm
from lilliput.graph.trace import Left

__all__ = [
    "Group",
    "Left",
    "Part",
    "Skip",
    "blocks_left",
    "choose",
    "fold_batchnorm",
    "groups",
    "left",
    "removable",
    "remove_blocks",
    "remove_channels",
]
