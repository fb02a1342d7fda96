"""Where points of the hole are in the reference, and the loss that teaches attention to look there."""

import numpy as np
import pytest
import torch

from mimicbrush_core.training.correspondence import POINTS, Matching, draw_points, looking_elsewhere
from mimicbrush_core.training.scenes import (
    CLIP_LIKE,
    Difficulty,
    render_between_objects,
    render_pair,
    render_textured_scene,
)

SIZE = 128


def points_of(pair, mask=None, seed=0):
    mask = pair.parts > 0 if mask is None else mask
    return draw_points(np.random.default_rng(seed), mask, pair.parts, pair.reference_parts, np.array(pair.moved))


def colors_at(picture, places):
    columns, rows = (places * len(picture)).astype(int).clip(0, len(picture) - 1).T
    return picture[rows, columns].astype(float)


@pytest.mark.parametrize("render", (render_pair, render_textured_scene))
def test_points_show_the_same_in_both_frames(render):
    right, wrong, counting = [], [], []
    for seed in range(12):
        pair = render(seed, SIZE, CLIP_LIKE)
        points = points_of(pair)
        known = points[points[:, 4] > 0]
        here, there = colors_at(pair.source, known[:, :2]), colors_at(pair.reference, known[:, 2:4])
        right.append(np.abs(here - there).mean())
        wrong.append(np.abs(here - there[::-1]).mean())
        counting.append(points[:, 4].mean())
    assert np.mean(right) < 0.3 * np.mean(wrong)  # light and edges differ
    assert np.mean(counting) > 0.8


def test_points_lie_in_the_mask_and_on_the_same_part():
    pair, part = render_between_objects(3, SIZE, CLIP_LIKE)
    mask = pair.parts == part
    points = points_of(pair, mask)
    columns, rows = (points[:, :2] * SIZE).astype(int).T
    assert mask[rows, columns].all()
    columns, rows = (points[points[:, 4] > 0, 2:4] * SIZE).astype(int).T
    assert len(rows) and (pair.reference_parts[rows, columns] == part).all()


def test_a_reference_that_is_the_source_shows_each_point_at_its_place():
    pair = render_pair(5, SIZE, Difficulty(0, 0, 0, 0.3))
    points = points_of(pair)
    assert np.allclose(points[:, :2], points[:, 2:4], atol=1e-5) and points[:, 4].all()


def test_without_an_object_in_the_mask_no_point_counts():
    pair = render_pair(5, SIZE)
    assert not points_of(pair, pair.parts == 0).any()


def test_points_outside_the_reference_do_not_count():
    parts, away = np.ones((SIZE, SIZE), np.uint8), np.array([[1.0, 0, SIZE / 2], [0, 1, 0], [0, 0, 1]])
    points = draw_points(np.random.default_rng(0), parts > 0, parts, parts, away)
    assert np.array_equal(points[:, 4] > 0, points[:, 0] < 0.5)


# --- the loss ----------------------------------------------------------------------------------------------


def at(*places):
    """Points [1,P,5] at (x, y) of the source, wanted at (x, y) of the reference."""
    return torch.tensor([[(*here, *there, 1.0) for here, there in places]])


def test_looking_everywhere_costs_the_logarithm_of_the_tokens():
    even = looking_elsewhere(torch.zeros(1, 16, 8), torch.zeros(1, 64, 8), at(((0.1, 0.9), (0.5, 0.2))))
    assert even == pytest.approx(np.log(64))


def test_looking_at_the_wanted_token_costs_nothing():
    key = 40 * torch.eye(16)[None]  # each token answers its own query
    query = key.roll(3, dims=1)  # query i looks at token i - 3
    # of a grid of 4 x 4: token 5 is row 1, column 1; it looks at token 2, row 0, column 2
    right = at(((0.375, 0.375), (0.625, 0.125)))
    assert looking_elsewhere(query, key, right) < 1e-3
    assert looking_elsewhere(query, key, at(((0.375, 0.375), (0.125, 0.625)))) > 100


def test_a_place_between_tokens_wants_them_in_shares():
    query = torch.zeros(1, 4, 2, requires_grad=True)
    key = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]], requires_grad=True)
    (found,) = torch.autograd.grad(looking_elsewhere(query, key, at(((0.1, 0.1), (0.375, 0.25)))), query)
    wanted = 0.75 * key[0, 0] + 0.25 * key[0, 1]  # minus the mean of all, which is 0
    assert torch.allclose(found[0, 0], -wanted / 2**0.5)
    assert not found[0, 1:].any()


def test_points_that_do_not_count_leave_no_gradient():
    query = torch.randn(1, 16, 8, requires_grad=True)
    nothing = torch.zeros(1, POINTS, 5)
    error = looking_elsewhere(query, torch.randn(1, 16, 8), nothing)
    error.backward()
    assert error == 0 and not query.grad.any()


def test_the_first_head_is_taught_and_blocks_are_averaged():
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    matching = Matching(at(((0.1, 0.9), (0.5, 0.2))).expand(2, -1, -1))
    first, second = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 64, 8)
    for key in (first, second):
        matching("block", query, [(key, key, 1.0)], None)
    loss = matching.loss()
    alone = [looking_elsewhere(query[:, 0], key[:, 0], matching._points) for key in (first, second)]
    assert torch.allclose(loss, torch.stack(alone).mean())
    loss.backward()
    assert query.grad[:, 0].any() and not query.grad[:, 1:].any()
