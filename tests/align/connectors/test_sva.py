"""The SVA's counts at full size, its masks, and what it says of a single encoder."""

from __future__ import annotations

import pytest
import torch

from align.connectors.sva import Sva, SvaConfig, real_cells, resize_grid

SIGLIP, CLIP, DINO, CONVNEXT = (729, 1152), (576, 1024), (729, 1536), (9216, 5760)
LENGTHS = [576, 576, 576, 9216]


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts() -> None:
    with torch.device("meta"):
        four = SvaConfig(token_lengths=LENGTHS).build([SIGLIP, CLIP, DINO, CONVNEXT], 4096)
        one = SvaConfig().build([SIGLIP], 4096)
    assert count(four.samplers) == 47_296_512
    assert count(one.samplers) == 28_336_128
    assert [count(aux) for aux in four.aux] == [2_232_320, 2_101_248, 2_625_536, 6_950_912]
    assert count(four.projector) == 20_979_712
    assert count(four) == 47_296_512 + 13_910_016 + 20_979_712 + 1024
    assert (four.num_tokens, four.grid) == (576, (24, 24))
    assert {name for name, _ in four.samplers[0][2].pos_embed.items()} == {"3"}  # type: ignore[index, union-attr]
    assert four.samplers[0][2].pos_embed["3"].shape == (16, 1024)  # type: ignore[index, union-attr]


@pytest.mark.parametrize(("out_width", "projector"), [(4096, 20_979_712), (5120, 31_467_520)])
def test_groups_widen_the_projector(out_width: int, projector: int) -> None:
    with torch.device("meta"):
        two = SvaConfig(groups=2).build([CLIP], out_width)
    assert count(two.samplers) == 2 * 28_336_128
    assert two.vision_query.shape == (2, 1024)
    assert count(two.projector) - projector == 1024 * out_width


def test_slow_parameters_are_the_queries_and_the_layers() -> None:
    sva = SvaConfig(width=8, side=2, heads=2).build([(4, 5)], 12)
    fast = {n for n, _ in sva.named_parameters() if not n.startswith(sva.slow_parameters)}
    assert {name.split(".")[0] for name in fast} == {"aux", "projector"}
    assert count(sva) - sum(sva.get_parameter(name).numel() for name in fast) == (
        count(sva.samplers) + sva.vision_query.numel()
    )


@pytest.mark.parametrize("size", [(64, 64), (640, 400)])
def test_one_key_leaves_weights_dead_and_says_so(size: tuple[int, int]) -> None:
    config = SvaConfig(width=16, side=4, depth=2, heads=2)
    [notice] = config.notices([(25, 5)])
    assert "one encoder at 16 tokens gives each query one key" in notice
    assert "token_lengths to [64]" in notice

    torch.manual_seed(0)
    sva = config.build([(25, 5)], 12)
    sva([torch.randn(3, 25, 5)], [size] * 3).square().sum().backward()
    dead = 0
    for name, parameter in sva.named_parameters():
        assert parameter.grad is not None, name
        if ".q_proj." in name or ".k_proj." in name:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
            dead += parameter.numel()
        else:
            assert parameter.grad.abs().max() > 0, name
    assert f"({dead:,} parameters)" in notice


@pytest.mark.parametrize(
    ("lengths", "towers"), [([2304], [SIGLIP]), ([], [SIGLIP, CLIP]), (LENGTHS, [SIGLIP] * 4)]
)
def test_several_keys_need_no_notice(lengths: list[int], towers: list[tuple[int, int]]) -> None:
    assert list(SvaConfig(token_lengths=lengths).notices(towers)) == []


@pytest.mark.parametrize(
    ("size", "side", "rows", "columns"),
    [
        ((384, 384), 24, 24, 24),
        ((640, 480), 24, 18, 24),
        ((480, 640), 24, 24, 18),
        ((500, 333), 24, 16, 24),  # 15.98 rows of content: 15, then 4.5 of padding: 4
        ((1920, 1080), 96, 54, 96),
        ((1000, 100), 24, 2, 24),
        ((10_000, 10), 24, 0, 24),  # thinner than a cell
        ((10, 10_000), 25, 25, 1),
        ((1, 1), 24, 24, 24),
    ],
)
def test_what_padding_leaves(size: tuple[int, int], side: int, rows: int, columns: int) -> None:
    real = real_cells(*size, side)
    assert (int(real.any(1).sum()), int(real.any(0).sum())) == (
        (rows, columns) if rows and columns else (0, 0)
    )
    assert torch.equal(real, real.flip(0)) and torch.equal(real, real.flip(1))


def test_masks() -> None:
    sva = SvaConfig(width=8, side=4, heads=2, token_lengths=[16, 256]).build(
        [(16, 5), (256, 5)], 12
    )
    assert sva.mask([(64, 64), (64, 63)]) is None
    # 640 x 400 on 16 x 16: 10 rows of content, 3 of padding above and below. On 4 x 4: 2 rows, 1.
    mask = sva.mask([(64, 64), (640, 400)])
    assert mask is not None and mask.shape == (2, 16, 17)
    assert mask[0].all()
    coarse, fine = mask[1].split([1, 16], dim=1)
    assert coarse.all()  # a window of one token is padding whole or not at all
    of_rows = fine.view(4, 4, 4, 4)  # rows and columns of windows, then within them
    assert torch.equal(of_rows[0, 2, :, 1], torch.tensor([False, False, False, True]))
    assert of_rows[1:3].all()
    assert torch.equal(of_rows[3, 0, :, 3], torch.tensor([True, False, False, False]))
    # 1000 x 100: 1 row of content, so 7 and 7 of padding: 2 rows in the middle are left, and the
    # first and last row of windows, all padding, see all of it.
    strip = sva.mask([(1000, 100)])
    assert strip is not None
    of_rows = strip[0, :, 1:].view(4, 4, 4, 4)
    assert of_rows[0].all() and of_rows[3].all()
    assert torch.equal(of_rows[1, 0, :, 0], torch.tensor([False, False, False, True]))
    assert torch.equal(of_rows[2, 0, :, 0], torch.tensor([True, False, False, False]))


def test_padding_does_not_reach_a_query_but_through_the_context() -> None:
    """With tower 0 left as it is, what stands in tower 1's masked cells changes nothing."""
    torch.manual_seed(0)
    config = SvaConfig(width=8, side=2, depth=2, heads=2, token_lengths=[4, 64])
    towers = [(4, 5), (64, 5)]
    first, second = torch.randn(1, 4, 5), torch.randn(1, 64, 5)
    changed = second.clone().view(1, 8, 8, 5)
    changed[:, :2] = 7.0
    changed[:, -2:] = -7.0
    sva = config.build(towers, 12)
    sizes = [(200, 100)]
    before = sva([first, second], sizes)
    assert torch.equal(before, sva([first, changed.view(1, 64, 5)], sizes))
    unmasked = SvaConfig(**{**vars(config), "mask_padding": False}).build(towers, 12)
    unmasked.load_state_dict(sva.state_dict())
    assert not torch.equal(before, unmasked([first, second], sizes))
    assert torch.equal(unmasked([first, second], sizes), unmasked([first, second], [(9, 9)]))


@pytest.mark.parametrize(("native", "side"), [(27, 24), (5, 4), (24, 48), (1, 3)])
def test_interpolation_is_exact_in_bf16(native: int, side: int) -> None:
    """It is computed in fp32 and rounded once."""
    features = torch.randn(2, native**2, 6).bfloat16()
    resized = resize_grid(features, side)
    assert resized.dtype == torch.bfloat16 and resized.shape == (2, side**2, 6)
    assert torch.equal(resized, resize_grid(features.float(), side).bfloat16())


def test_a_grid_of_its_own_size_is_left_alone() -> None:
    features = torch.randn(2, 16, 6)
    assert resize_grid(features, 4) is features


def test_other_features_than_it_was_built_for_are_told() -> None:
    sva = SvaConfig(width=8, side=2, heads=2).build([(4, 5), (9, 3)], 12)
    good = [torch.randn(2, 4, 5), torch.randn(2, 9, 3)]
    with pytest.raises(ValueError, match=r"built for features \[\(2, 4, 5\), \(2, 9, 3\)\] of 2"):
        sva([good[0], torch.randn(2, 16, 3)], [(8, 8)] * 2)
    with pytest.raises(ValueError, match="of 3 images"):
        sva(good, [(8, 8)] * 3)
    with pytest.raises(ValueError, match="got"):
        sva(good[:1], [(8, 8)] * 2)


def test_at_least_one_encoder() -> None:
    with pytest.raises(ValueError, match="features of at least one encoder, got none"):
        SvaConfig().build([], 12)


def test_it_stays_what_it_is_in_a_state_dict() -> None:
    config = SvaConfig(width=8, side=2, heads=2, token_lengths=[16])
    one, other = (Sva(config, [(4, 5)], 12) for _ in range(2))
    other.load_state_dict(one.state_dict())
    features = [torch.randn(2, 4, 5)]
    assert torch.equal(one(features, [(8, 4)] * 2), other(features, [(8, 4)] * 2))
