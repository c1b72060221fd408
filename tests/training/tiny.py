"""A VQ-GAN small enough to train and to run on a CPU in tests."""

from nuwa.spec.config import VQGANConfig

TINY_VQGAN = VQGANConfig(
    resolution=64,
    base_channels=32,
    channel_multipliers=(1, 1, 1, 1),
    res_blocks=1,
    attention_resolutions=(),
    z_channels=8,
    embedding_dim=8,
    codebook_size=16,
)
