"""VQ-GAN: taming-transformers' names and shapes, its GroupNorm, its codebook, its losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from nuwa.spec.config import VQGANConfig
from nuwa.training.codebook import CodebookAverage
from nuwa.training.vqgan import VQGAN, GroupNorm, Quantizer, to_bytes, to_signed
from nuwa.training.vqgan_content import Pictures
from nuwa.training.vqgan_losses import (
    PatchDiscriminator,
    adaptive_weight,
    class_map_error,
    quantization_loss,
    reconstruction_error,
)

IMAGENET_F16 = VQGANConfig(
    resolution=256, attention_resolutions=(16,), codebook_size=1024, embedding_dim=256
)


def test_state_dict_has_tamings_names_and_shapes():
    """A sample of every kind of key of taming's vqgan_imagenet_f16_1024 checkpoint."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in VQGAN(IMAGENET_F16).state_dict().items()}
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.0.norm1.weight": (128,),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.4.block.1.conv2.bias": (512,),
        "encoder.down.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "encoder.mid.block_1.conv1.weight": (512, 512, 3, 3),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
        "decoder.up.4.attn.2.k.bias": (512,),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.1.block.0.conv1.weight": (128, 256, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "quantize.embedding.weight": (1024, 256),
        "quant_conv.weight": (256, 256, 1, 1),
        "post_quant_conv.bias": (256,),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    assert "encoder.down.4.downsample.conv.weight" not in shapes
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert not any(".attn." in key for key in shapes if ".4." not in key)


def test_attention_survives_336():
    with torch.device("meta"):
        at_256 = VQGAN(IMAGENET_F16).state_dict()
        at_336 = VQGAN(
            VQGANConfig(codebook_size=1024)  # the paper's: 336, attention at 21
        ).state_dict()
    assert {k: v.shape for k, v in at_256.items()} == {k: v.shape for k, v in at_336.items()}


def test_shapes_and_pixel_conversions():
    model = VQGAN(
        VQGANConfig(
            resolution=32,
            base_channels=32,
            channel_multipliers=(1, 1, 2),
            attention_resolutions=(8,),
            codebook_size=20,
            embedding_dim=6,
            z_channels=10,
        )
    ).eval()
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(to_bytes(to_signed(pixels)), pixels)
    with torch.no_grad():
        encoded = model.encode(to_signed(pixels))
        assert encoded.features.shape == (2, 6, 8, 8)
        assert encoded.codes.shape == (2, 8, 8)
        assert model.decode(encoded.codes).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(("batch", "channels", "size"), [(1, 32, 5), (3, 64, 4), (2, 96, 1)])
def test_fast_group_norm_has_the_plain_gradients(batch, channels, size):
    torch.manual_seed(0)
    fast = GroupNorm(32, channels, eps=1e-6).double()
    torch.nn.init.normal_(fast.weight)
    torch.nn.init.normal_(fast.bias)
    x = torch.randn(batch, channels, size, size, dtype=torch.double, requires_grad=True)
    grad = torch.randn_like(x)
    got = torch.autograd.grad(fast(x), [x, fast.weight, fast.bias], grad)
    plain = F.group_norm(x, 32, fast.weight, fast.bias, 1e-6)
    expected = torch.autograd.grad(plain, [x, fast.weight, fast.bias], grad)
    for a, b in zip(got, expected, strict=True):
        # Sums are kept in fp32.
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_nearest_code():
    quantizer = Quantizer(50, 4)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(300, 4)
    expected = torch.cdist(z, quantizer.embedding.weight).argmin(1)
    assert torch.equal(quantizer.codes(z), expected)


def test_codebook_follows_clusters_and_revives_dead_codes():
    torch.manual_seed(0)
    quantizer = Quantizer(12, 2)
    average = CodebookAverage(quantizer, decay=0.9, revive_below=0.1)
    centres = torch.tensor([[float(x), float(y)] for x in (-9, -3, 3, 9) for y in (-5, 5)])

    def batch() -> torch.Tensor:
        return centres.repeat(30, 1) + 0.1 * torch.randn(240, 2)

    average.initialise(batch())
    quantizer.embedding.weight.data[3:] = 1000.0  # codes that nothing is near
    average.total.copy_(quantizer.embedding.weight * average.count[:, None])
    revived = 0
    for _ in range(200):
        features = batch()
        revived += average.update(features, quantizer.codes(features))
    assert revived >= 9
    found = torch.cdist(centres, quantizer.embedding.weight).amin(1)
    assert found.max() < 0.5


@pytest.mark.parametrize("keep", [0, 7, 12])
def test_a_codebook_begins_with_the_codes_that_are_kept(keep):
    torch.manual_seed(0)
    quantizer = Quantizer(12, 2)
    before = quantizer.embedding.weight.detach().clone()
    features = 10.0 + torch.randn(240, 2)
    CodebookAverage(quantizer).initialise(features, keep)
    assert torch.equal(quantizer.embedding.weight[:keep], before[:keep])
    assert (quantizer.embedding.weight[keep:] > 5.0).all(), "the others are features"


def test_codes_without_features_enough_are_given_some_by_the_next_steps():
    torch.manual_seed(0)
    quantizer = Quantizer(50, 2)
    average = CodebookAverage(quantizer)
    average.initialise(torch.randn(20, 2), keep=5)
    weight = quantizer.embedding.weight
    assert int((average.count > 0).sum()) == 25 and len(weight.unique(dim=0)) == 50
    codes = torch.zeros(20, dtype=torch.long)
    assert [average.update(torch.randn(20, 2), codes) for _ in range(3)] == [20, 5, 0]


def test_codes_are_revived_where_the_output_is_wrong():
    """Many features far from any code, of which nothing depends, and few of which it does."""
    torch.manual_seed(0)
    quantizer = Quantizer(9, 2)
    average = CodebookAverage(quantizer)
    average.worth[1:] = 0.0
    features = 50.0 + torch.randn(100, 2)
    features[:4] *= -1.0
    cost = torch.zeros(100)
    cost[:4] = 1.0
    assert average.update(features, torch.zeros(100, dtype=torch.long), cost) == 8
    assert int((quantizer.embedding.weight[1:] < 0).all(dim=1).sum()) == 4


def test_codes_of_what_nobody_sees_go_to_what_is_wrong():
    """Half of the features are background, which differs in nothing that shows."""
    torch.manual_seed(0)
    quantizer = Quantizer(40, 2)
    average = CodebookAverage(quantizer, decay=0.95, revive_below=0.3)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        features = 3.0 * torch.randn(400, 2)
        features[:200] -= 50.0
        nearest = torch.cdist(features, quantizer.embedding.weight).amin(1)
        return features, nearest * torch.cat([torch.full((200,), 1e-3), torch.ones(200)])

    def seen() -> int:
        return int((quantizer.embedding.weight > -25.0).all(dim=1).sum())

    average.initialise(batch()[0])
    assert seen() < 30
    for _ in range(300):
        features, cost = batch()
        average.update(features, quantizer.codes(features), cost)
    assert 34 <= seen() < 40, "but some are left for the background"


def test_losses():
    x, y = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    assert reconstruction_error(x, y).tolist() == [[[0.5] * 4] * 4]
    assert reconstruction_error(x, y, square=2.0).mean().item() == pytest.approx(1.0)
    x[0, :, 0, 0] = 1.0  # one bright pixel on black weighs 1 + 4
    error = reconstruction_error(x, y, emphasis=4.0)
    assert error[0, 0, 0].item() == pytest.approx(2.5)
    assert error[0].sum().item() == pytest.approx(15 * 0.5 + 2.5)
    pictures = Pictures(perceptual=lambda a, b: torch.ones(1))
    assert pictures.error(x, y).mean() + pictures.perceived(x, y) == pytest.approx(1.5)


def test_a_pixel_of_a_class_weighs_more():
    one_hot = torch.zeros(1, 3, 2, 2)
    one_hot[0, 0] = 1.0
    one_hot[0, :, 0, 0] = torch.tensor([0.0, 1.0, 0.0])
    error = class_map_error(one_hot, torch.zeros(1, 3, 2, 2), emphasis=3.0)
    each = 3 * math.log(2.0)
    assert error[0].flatten().tolist() == pytest.approx([4 * each, each, each, each])


def test_commitment_weighs_the_encoder_term():
    """taming's `legacy=False`: beta scales what pulls features to codes, not codes to features."""
    features = torch.zeros(4, requires_grad=True)
    codes = torch.ones(4, requires_grad=True)
    quantization_loss(features, codes, 0.25).backward()
    assert torch.allclose(codes.grad, torch.full((4,), 0.5))
    assert torch.allclose(features.grad, torch.full((4,), -0.125))


def test_adaptive_weight_is_the_ratio_of_gradients():
    weight = torch.ones(3, requires_grad=True)
    ratio = adaptive_weight((6.0 * weight).sum(), (2.0 * weight).sum(), weight)
    assert ratio.item() == pytest.approx(3.0, rel=1e-3)
    none = adaptive_weight((6.0 * weight).sum(), (0.0 * weight).sum(), weight)
    assert none.item() == pytest.approx(1e4)


def test_discriminator_judges_patches():
    logits = PatchDiscriminator(width=8)(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 1, 6, 6)
