"""The key queue compared with collections.deque, which is first-in first-out by definition."""

from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mochi.contrast.key_queue import KeyQueue


@given(st.integers(1, 12), st.lists(st.integers(1, 30), max_size=12))
def test_any_batch_size_is_exact_fifo(size: int, batches: list[int]) -> None:
    """K not a multiple of the batch size, batches larger than K, and batches that wrap around."""
    queue = KeyQueue(size, 2)
    expected: deque[int] = deque(maxlen=size)
    counter = 0
    for batch in batches:
        labels = torch.arange(counter, counter + batch)
        queue.enqueue(labels[:, None].expand(-1, 2).float(), labels, labels + 7)
        expected.extend(labels.tolist())
        counter += batch
        in_order = queue.labels.roll(-int(queue.position)).tolist()
        assert [label for label in in_order if label >= 0] == list(expected)
        known = queue.labels >= 0
        assert torch.equal(queue.keys[known, 0].long(), queue.labels[known])
        assert torch.equal(queue.images, torch.where(known, queue.labels + 7, -1))
    assert queue.fill() == pytest.approx(min(counter / size, 1))


def test_initial_rows_are_unit_vectors() -> None:
    """Along the feature axis: normalising the other axis is a known mistake."""
    torch.testing.assert_close(KeyQueue(50, 8).keys.norm(dim=-1), torch.ones(50))


def test_initial_rows_have_no_preferred_direction_and_no_label() -> None:
    queue = KeyQueue(4000, 8, torch.Generator().manual_seed(0))
    assert queue.keys.mean(0).abs().max() < 0.03
    assert (queue.labels == -1).all()
    assert (queue.images == -1).all()


def test_half_precision_keys_without_labels_are_stored_in_float32_as_unknown() -> None:
    queue = KeyQueue(3, 4)
    keys = torch.randn(2, 4).bfloat16()
    queue.enqueue(keys, torch.tensor([5, 6]), torch.tensor([7, 8]))
    queue.enqueue(keys)
    assert torch.equal(queue.keys, keys[[1, 1, 0]].float())
    assert queue.labels.tolist() == [-1, 6, -1]
    assert queue.images.tolist() == [-1, 8, -1]


def test_the_state_dict_restores_the_queue() -> None:
    queue = KeyQueue(10, 4)
    queue.enqueue(torch.eye(4), torch.arange(4))
    restored = KeyQueue(10, 4)
    restored.load_state_dict(queue.state_dict())
    for each in (queue, restored):
        each.enqueue(2 * torch.eye(4), torch.arange(4, 8))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name
