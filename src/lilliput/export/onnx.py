"""What the rooms above and users' scripts need of ONNX files, in one place; it is implemented in lilliput.onnx."""

from lilliput.onnx.clean import clean, opset_of, renamed
from lilliput.onnx.compare import agreement, verify
from lilliput.onnx.load import load_onnx
from lilliput.onnx.names import signed, stripped
from lilliput.onnx.narrow import narrow
from lilliput.onnx.session import Inputs, Session, arrays, quiet
from lilliput.onnx.structure import Structure
from lilliput.onnx.trace import trace

__all__ = [
    "Inputs",
    "Session",
    "Structure",
    "agreement",
    "arrays",
    "clean",
    "load_onnx",
    "narrow",
    "opset_of",
    "quiet",
    "renamed",
    "signed",
    "stripped",
    "trace",
    "verify",
]
