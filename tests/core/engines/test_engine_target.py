from __future__ import annotations

import pytest
from core.engines.conftest import L4

from vpdeploy.engines.target import choose_targets, parse_targets, supported_targets
from vpdeploy.engines.toolkit import Toolkit
from vpdeploy.errors import SpecError


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("sm_86", ("sm_86",)),
        ("sm_120,sm_75, sm_86", ("sm_75", "sm_86", "sm_120")),
        ("86,SM89,8.0,12.0,sm86", ("sm_80", "sm_86", "sm_89", "sm_120")),
    ],
)
def test_targets_are_read_in_the_spellings_in_use(text: str, targets: tuple[str, ...]):
    assert parse_targets(text) == targets


@pytest.mark.parametrize("text", ["", "ampere", "sm_86;sm_89", "sm_", "8", "8.66", "sm_1234", "sm_86,"])
def test_what_is_no_target_is_refused(text: str):
    with pytest.raises(SpecError, match="is no GPU architecture; write"):
        parse_targets(text)


def test_tensorrt_rtx_has_the_targets_that_the_documentation_lists(rtx: Toolkit):
    assert {"sm_75", "sm_80", "sm_86", "sm_89", "sm_120"} <= set(supported_targets(rtx))


def test_this_machines_gpu_is_the_default(rtx: Toolkit):
    assert choose_targets(rtx, None, L4) == ("sm_89",)
    assert choose_targets(rtx, ("sm_86",), L4) == ("sm_86",)
