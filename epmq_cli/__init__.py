"""epmq: many fine-tuned experts in, one 4-bit model out."""

__version__ = "0.1.0"
