"""Image sources, the latent codec and stored latents: everything between a folder of images and a training batch."""
