"""The thread that prepares batches."""

import torch

from aime_fast.data.prefetch import Prefetcher


def test_the_thread_computes_alone_and_the_others_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    ahead = Prefetcher(lambda number: torch.get_num_threads(), 0, ahead=1)
    try:
        assert ahead.next() == 1
        assert torch.get_num_threads() == 2
    finally:
        ahead.stop()
        torch.set_num_threads(before)
