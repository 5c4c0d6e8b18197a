"""Response formats on a GPU: what tests/service/test_structured_output.py holds a CPU to."""

from __future__ import annotations

import pytest

from service.test_real_engine import model, real  # noqa: F401 - fixtures
from service.test_structured_output import (  # noqa: F401 - the tests of that file, run here on the GPU
    test_a_bound_answer_is_the_same_alone_and_in_a_crowd,
    test_a_format_too_costly_on_the_way_ends_its_own_job,
    test_an_answer_may_be_cut_by_count_or_by_a_stop_string,
    test_bias_and_logprobs_work_inside_a_format,
    test_every_answer_is_json_of_the_schema,
    test_every_answer_matches_the_regex,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> str:
    return "cuda:0"
