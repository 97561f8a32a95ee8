"""VAPT: the compact form that is trained and deployed equals the published sequence of layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train.toys import CLASSES, DEPTH, PATCH, SIDE, WIDTH, make_vit, random_pixels

from vpdeploy.errors import SpecError
from vpdeploy.format.task import Stage
from vpdeploy_train.methods import METHODS
from vpdeploy_train.methods.kept import Kept, Masks
from vpdeploy_train.methods.method import NoPrompts, PromptDimensions
from vpdeploy_train.methods.vapt import VAPT
from vpdeploy_train.prompted import PromptedViT
from vpdeploy_train.trunks import trunk_of

GRID = SIDE // PATCH
TOKENS, HIDDEN, KERNEL = 5, 3, 2
EXACT = 1e-12


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max())


def make_method(vit: nn.Module, *, kept: Kept | None = None, kernel: int = KERNEL, eps: float = 1e-5) -> VAPT:
    """Random in every tensor, so that each of them matters."""
    everything = Kept.everything(DEPTH, TOKENS, 0, HIDDEN)
    method = VAPT(PromptDimensions.of(trunk_of(vit)), kept or everything, kernel=kernel, eps=eps)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return method.double().eval()


def published(method: VAPT, block: int, patches: Tensor) -> Tensor:
    """Layer by layer: norm, to the grid, one kernel for all channels, token projector, feature projector."""
    batch, _, width = patches.shape
    x = F.layer_norm(patches, (width,), method.norm_weight[block], method.norm_bias[block], method.eps)
    x = x.transpose(1, 2).reshape(batch, width, GRID, GRID)
    kernel = method.kernels[block].expand(width, 1, -1, -1)
    x = F.conv2d(x, kernel, groups=width).flatten(2)
    made = F.linear(x, method.linear_weight[block], method.linear_bias[block]).transpose(1, 2)
    return made + F.linear(torch.relu(F.linear(made, method.down)), method.up)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_prompts_are_those_of_the_published_layers(kernel):
    vit = make_vit().double()
    method = make_method(vit, kernel=kernel)
    trunk = trunk_of(vit)
    tokens = trunk.embed(random_pixels(3))
    patches = tokens[:, 1:]
    for index in range(1, DEPTH):
        assert difference(method.prompts(index, trunk, tokens), published(method, index - 1, patches)) < EXACT


def test_registers_are_not_patches():
    vit = make_vit(reg_tokens=3).double()
    method, trunk = make_method(vit), trunk_of(vit)
    tokens = trunk.embed(random_pixels(2))
    assert difference(method.prompts(1, trunk, tokens), published(method, 0, tokens[:, 4:])) < EXACT


def test_the_model_equals_prompts_as_tokens():
    vit = make_vit().double()
    method = make_method(vit)
    model = PromptedViT(vit, method, CLASSES).double().eval()
    pixels = random_pixels(3)
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
    for index, block in enumerate(vit.blocks):
        prompts = method.first.expand(3, -1, -1) if index == 0 else published(method, index - 1, tokens[:, 1:])
        joined = block(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1))
        tokens = torch.cat([joined[:, :1], joined[:, 1 + TOKENS :]], dim=1)
    expected = vit.forward_head(vit.norm(tokens), pre_logits=True)
    with torch.no_grad():
        assert difference(model.features(pixels), expected) < 1e-10


def test_the_generator_is_the_same_function():
    vit = make_vit().double()
    method, trunk = make_method(vit), trunk_of(vit)
    tokens = trunk.embed(random_pixels(2))
    for index in range(1, DEPTH):
        made = method.generator(index, trunk)
        normalised = F.layer_norm(trunk.patches(tokens), (WIDTH,), eps=made.eps)
        mixed = made.scale * (made.mix @ normalised) + made.shift
        prompts = mixed + torch.relu(mixed @ made.down.T) @ made.up.T
        assert difference(prompts, method.prompts(index, trunk, tokens)) < EXACT
    assert method.generator(0, trunk) is None


def fresh(vit: nn.Module, start: str) -> VAPT:
    options = VAPT.Options(prompt_tokens=TOKENS, vapt_start=start, prompt_dropout=0.0)
    method = METHODS["vapt"].create(PromptDimensions.of(trunk_of(vit)), options, torch.Generator().manual_seed(0))
    assert isinstance(method, VAPT)
    return method


def test_adaptive_prompts_that_start_as_in_the_paper_are_exactly_zero():
    vit = make_vit()
    method, trunk = fresh(vit, "zero"), trunk_of(vit)
    tokens = trunk.embed(random_pixels(2, dtype=torch.float32))
    assert all((method.prompts(index, trunk, tokens) == 0).all() for index in range(1, DEPTH))
    assert method.prompts(0, trunk, tokens).abs().min() > 0


@pytest.mark.parametrize("start", ["zero", "apart"])
def test_tokens_that_start_at_zero_stay_alike_and_those_that_start_apart_do_not(start):
    vit = make_vit()
    model = PromptedViT(vit, fresh(vit, start), CLASSES).train()
    optimizer = torch.optim.SGD(model.method.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(random_pixels(4, dtype=torch.float32)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    weight = model.method.linear_weight[1].detach()
    spread = float(weight.std(0).max() / weight.abs().max())
    assert float(weight.abs().max()) > 0
    assert spread < 1e-4 if start == "zero" else spread > 0.1


def test_every_tensor_learns_from_the_second_step_on():
    vit = make_vit().double()
    model = PromptedViT(vit, make_method(vit), CLASSES).double()
    F.cross_entropy(model(random_pixels(4)), torch.tensor([0, 1, 2, 0])).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.method.parameters())


@pytest.mark.parametrize(("tokens", "expected"), [(10, 55_608), (50, 161_128)])
def test_parameters_are_counted_as_in_the_paper(tokens, expected):
    blocks = (Stage(depth=12, width=768, heads=12),) * 12
    dimensions = PromptDimensions(blocks=blocks, patch_size=16, grid=14, norm_eps=1e-6)
    method = METHODS["vapt"].create(dimensions, VAPT.Options(prompt_tokens=tokens), torch.Generator())
    assert method.summary()["parameters"] == expected


@pytest.mark.parametrize(("norm", "eps"), [("block", 1e-6), ("paper", 1e-5)])
def test_the_layer_norms_eps_is_the_blocks_or_the_papers(norm, eps):
    dimensions = PromptDimensions.of(trunk_of(make_vit()))
    assert METHODS["vapt"].create(dimensions, VAPT.Options(vapt_norm=norm), torch.Generator()).eps == eps


def test_dropout_drops_whole_channels_while_training():
    vit = make_vit().double()
    method, trunk = make_method(vit), trunk_of(vit)
    tokens = trunk.embed(random_pixels(2))
    with torch.no_grad():
        method.up.zero_()  # leaves G alone
    still = method.prompts(1, trunk, tokens) - method.linear_bias[0][:, None]
    torch.manual_seed(0)
    method.train()
    ratios = (method.prompts(1, trunk, tokens) - method.linear_bias[0][:, None]) / still
    kept = ratios[:, 0] > 0.5
    expected = (kept.double() / 0.9)[:, None].expand_as(ratios)
    assert difference(ratios, expected) < 1e-9
    assert 0 < (~kept).sum() < kept.numel() / 2


KEPT = Kept(
    tokens=((1, 3), (0, 4), (2,)),
    kv_tokens=((),) * 3,
    segments=(((True,) * 16,) * 2, ((True,) * 16,) * 2, ((True,) * 16,)),
    hidden=(0, 2),
)


def test_pruning_gathers_what_masks_of_one_would_leave():
    vit = make_vit().double()
    method, trunk = make_method(vit), trunk_of(vit)
    smaller = method.pruned_to(KEPT, method.state_dict()).double().eval()
    tokens = trunk.embed(random_pixels(2))
    hidden = torch.tensor([float(unit in KEPT.hidden) for unit in range(HIDDEN)], dtype=torch.float64)
    masks = Masks(tokens=[torch.ones(TOKENS, dtype=torch.float64)] * DEPTH, kv_tokens=[], segments=[], hidden=hidden)
    with method.masked(masks), torch.no_grad():
        for index, rows in enumerate(KEPT.tokens):
            whole = method.prompts(index, trunk, tokens)[..., list(rows), :]
            assert difference(smaller.prompts(index, trunk, tokens), whole) < EXACT
    assert smaller.summary()["parameters"] < method.summary()["parameters"]


def test_pruning_shares_no_memory():
    vit = make_vit().double()
    method = make_method(vit)
    state = method.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    smaller = method.pruned_to(Kept.everything(DEPTH, TOKENS, 0, HIDDEN), state)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_the_stored_structure_restores_the_method():
    vit = make_vit().double()
    method = make_method(vit).pruned_to(KEPT, make_method(vit).state_dict())
    dimensions = PromptDimensions.of(trunk_of(vit))
    again = METHODS["vapt"].restore(dimensions, method.structure())
    again.load_state_dict(method.state_dict(), strict=True)
    assert again.structure() == method.structure()


def test_another_image_size_is_refused():
    structure = make_method(make_vit()).structure()
    with pytest.raises(ValueError, match=r"grid of 4x4 patches, the backbone has 8.*cannot change the image size"):
        METHODS["vapt"].restore(PromptDimensions.of(trunk_of(make_vit(img_size=2 * SIDE))), structure)


def test_a_kernel_larger_than_the_grid_is_refused():
    with pytest.raises(SpecError, match="kernel of 9 does not fit a grid of 4x4"):
        make_method(make_vit(), kernel=9)


def test_a_backbone_without_one_grid_is_refused():
    blocks = (Stage(depth=2, width=32, heads=2),) * 2
    with pytest.raises(SpecError, match="needs a backbone whose blocks share one patch grid"):
        VAPT(PromptDimensions(blocks=blocks, patch_size=4), Kept.everything(2, 3, 0, 2))


def test_without_prompt_tokens_nothing_is_left():
    vit = make_vit().double()
    none = Kept(tokens=((),) * 3, kv_tokens=((),) * 3, segments=((),) * 3, hidden=(0,))
    pixels = random_pixels(2)
    with torch.no_grad():
        found = PromptedViT(vit, make_method(vit, kept=none), CLASSES).double().features(pixels)
        assert difference(found, PromptedViT(vit, NoPrompts(), CLASSES).double().features(pixels)) == 0
