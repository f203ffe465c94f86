"""Batches are the same for frames in a memory map and on the device, and after the copy between them."""

import dataclasses
import itertools

import pytest
import torch
from recordings import SMALL, equal

from aime_fast.data import SyntheticEpisodes, make_batches
from aime_fast.data.batches import SequenceBatches
from aime_fast.data.replay import DEVICE_SHARE, KEYS, Replay, replay_bytes, replay_on_device
from aime_fast.errors import DataError


@pytest.fixture
def batches():
    made = []

    def make(source=None, **changed):
        source = source or SyntheticEpisodes(4, 16, seed=0)
        settings = {"sequence_length": 7, "batch_size": 4, "seed": 3, **changed}
        made.append(SequenceBatches(source, [2, 0, 3], **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_auto_takes_the_gpu_up_to_a_share_of_its_memory_and_device_up_to_all_of_it():
    free = 1000
    share = int(DEVICE_SHARE * free)
    assert [replay_on_device("auto", needed, free) for needed in (0, share, share + 1, free)] == [True, True, False, False]
    assert [replay_on_device("device", needed, free) for needed in (share + 1, free)] == [True, True]
    assert not replay_on_device("host", 0, free)
    with pytest.raises(DataError, match=r"--replay device: .* need 3\.0 GiB, the device has 2\.0 GiB free; pass --replay host"):
        replay_on_device("device", 3 * 2**30, 2 * 2**30)


@pytest.mark.parametrize("choice", ["auto", "device", "host"])
def test_on_a_cpu_every_choice_means_the_memory_map(choice):
    pair = make_batches(dataclasses.replace(SMALL, replay=choice), 0, "cpu")
    assert [each.resident for each in pair] == [False, False]
    for each in pair:
        each.close()


def test_replay_bytes_are_those_of_the_frames():
    source = SyntheticEpisodes(2, 16, seed=0)
    for resident in (False, True):
        frames = Replay(source, [0, 1], [0, 100, 200], torch.device("cpu"), resident).frames
        assert sum(frames[key].numel() * frames[key].element_size() for key in KEYS) == replay_bytes(200, 16, source.action_dim)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resident_frames_give_the_same_bits(batches, prefetch):
    mapped, resident = batches(), batches(resident=True, prefetch=prefetch)
    assert (mapped.resident, resident.resident) == (False, True)
    for _ in range(mapped.steps_per_epoch + 2):
        assert equal(next(mapped), next(resident))
    assert mapped.state_dict() == resident.state_dict()
    assert all(equal(a, b) for a, b in zip(mapped.one_pass(), resident.one_pass(), strict=True))
    assert all(equal(mapped.episode(i), resident.episode(i)) for i in range(3))
    assert torch.equal(mapped.mean_frame(), resident.mean_frame())


def test_a_run_resumes_with_the_frames_stored_elsewhere(batches):
    mapped, resident = batches(), batches(resident=True)
    for _ in itertools.islice(mapped, mapped.steps_per_epoch + 3):
        pass
    resident.load_state_dict(mapped.state_dict())
    assert equal(next(mapped), next(resident))


@pytest.mark.cuda
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("resident", [True, False])
def test_a_gpu_gets_the_bits_of_the_cpu(batches, resident, prefetch):
    cpu, gpu = batches(), batches(device="cuda", resident=resident, prefetch=prefetch)
    for _ in range(cpu.steps_per_epoch + 2):
        batch = next(gpu)
        assert all(batch[key].is_cuda for key in KEYS)
        assert equal(next(cpu), batch)
    assert all(equal(a, b) for a, b in zip(cpu.one_pass(), gpu.one_pass(), strict=True))
    assert equal(cpu.episode(1), gpu.episode(1))
    assert torch.equal(cpu.mean_frame(), gpu.mean_frame().cpu())


@pytest.mark.cuda
@pytest.mark.parametrize("resident", [True, False])
def test_batches_are_read_after_their_copy_and_overwritten_after_their_use_and_the_host_never_waits(batches, resident):
    source = SyntheticEpisodes(4, 64, seed=0)
    cpu, gpu = batches(source, batch_size=8), batches(source, batch_size=8, device="cuda", resident=resident)
    next(cpu), next(gpu)
    copies, slow = gpu._replay._stream, 10_000_000  # clock cycles: milliseconds, far longer than a copy
    taken = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(12):
            if copies is not None:
                with torch.cuda.stream(copies._stream):
                    torch.cuda._sleep(slow)  # a consumer that did not wait would read before the copy
            batch = next(gpu)
            torch.cuda._sleep(slow)  # memory that is freed too soon would be overwritten before this read
            taken.append(batch.clone())
            del batch
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(equal(next(cpu), batch) for batch in taken)


@pytest.mark.cuda
def test_batches_are_made_while_a_graph_is_captured(batches):
    cpu, gpu = batches(), batches(device="cuda", resident=False, prefetch=2)
    assert equal(next(cpu), next(gpu))
    count, graph = torch.zeros((), device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        count += 1
        sent = [gpu._thread.next() for _ in range(8)]  # more than were made ahead: the thread copies now
    graph.replay()
    assert int(count) == 1
    assert all(equal(next(cpu), gpu._replay.deliver(each)) for each in sent)


@pytest.mark.cuda
def test_the_choice_of_replay_is_followed_on_a_gpu():
    for choice, expected in {"auto": True, "device": True, "host": False}.items():
        pair = make_batches(dataclasses.replace(SMALL, replay=choice), 0, "cuda")
        assert [each.resident for each in pair] == [expected, expected]
        assert all(next(each)["pixels"].is_cuda for each in pair)
        for each in pair:
            each.close()
