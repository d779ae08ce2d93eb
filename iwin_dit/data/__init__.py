"""Sources of images and clips, the latent codec and stored latents: everything between files and a training batch."""
