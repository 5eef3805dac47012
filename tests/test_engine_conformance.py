"""ONNX's own node tests: a sample of them here, all of them in evidence/engine-conformance.py."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def conformance() -> ModuleType:
    path = Path(__file__).parents[1] / "evidence" / "engine-conformance.py"
    spec = importlib.util.spec_from_file_location("engine_conformance", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["engine_conformance"] = module
    spec.loader.exec_module(module)
    return module


SAMPLE = (
    "test_gather_negative_indices",
    "test_resize_downsample_scales_cubic_A_n0p5_exclude_outside",
    "test_scatternd_add",
    "test_slice_negative_axes",
    "test_reflect_pad",
    "test_onehot_with_negative_axis",
    "test_training_dropout_zero_ratio_mask",
    "test_reversesequence_batch",
    "test_cast_FLOAT16_to_DOUBLE",
)


def test_a_sample_of_onnx_tests_passes(conformance: ModuleType) -> None:
    cases = {test.name: test for test in conformance.tests() if test.name in SAMPLE}
    assert set(cases) == set(SAMPLE)
    assert not {name: reason for name, test in cases.items() if (reason := conformance.judged(test))}


@pytest.mark.slow
def test_all_that_is_promised_pass(conformance: ModuleType) -> None:
    assert conformance.measure(quick=False)["passed"]
