"""Published checkpoints as our models. Other conventions of time, sign and layout are mapped here and nowhere else."""

from .flashdit import convert_flashdit, read_checkpoint, read_latent_stats

__all__ = ["convert_flashdit", "read_checkpoint", "read_latent_stats"]
