"""Properties of the HGA method (tests/hga/test_properties.py) on the Triton kernels, in the interpreter.

Those that take few and short calls: an interpreted call takes tenths of a second.
"""

import pytest
import test_properties as properties
import torch
from sides import Side

pytest.importorskip("triton.language")

slow = pytest.mark.slow


@pytest.fixture
def on():
    return Side("triton", torch.float32, 1e-5, exact=False)


test_p03_short_input = properties.test_p03_short_input
test_p09_share_kv_gives_one_route_per_kv_head = properties.test_p09_share_kv_gives_one_route_per_kv_head
test_p10_extreme_cuts_and_anchors = properties.test_p10_extreme_cuts_and_anchors
test_p11_a_single_token_is_its_own_summary = properties.test_p11_a_single_token_is_its_own_summary
test_p19_summaries_do_not_depend_on_the_order_in_a_group = (
    properties.test_p19_summaries_do_not_depend_on_the_order_in_a_group
)

test_p16_ties_go_to_the_lowest_id = slow(properties.test_p16_ties_go_to_the_lowest_id)
test_p19_a_group_is_a_set = slow(properties.test_p19_a_group_is_a_set)
test_p26_queries_that_see_nothing = slow(properties.test_p26_queries_that_see_nothing)
